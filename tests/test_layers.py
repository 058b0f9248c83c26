"""Who may import whom, read from the imports themselves; and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "edm2"
# A part may import parts of a lower floor, and those of its own floor that are named beside it.
FLOORS = {
    "extras": (0, ()),
    "files": (0, ("ema",)),
    "progress": (0, ()),
    "memory": (0, ()),
    "ema": (0, ()),
    "nn": (0, ()),
    "metrics": (0, ("extras", "files", "progress")),
    "diffusion": (1, ()),
    "data": (1, ()),
    "train": (2, ()),
    "report": (2, ()),
    "interop": (2, ("train",)),
    "generate": (3, ()),
    "presets": (3, ()),
    "advice": (4, ()),
    "evaluation": (4, ()),
    "forecast": (4, ("tuning",)),
    "tuning": (4, ("evaluation",)),
    "ladder": (4, ("evaluation", "tuning")),
    "hub": (4, ("evaluation", "tuning")),
    "distill": (4, ("hub",)),
    "demo": (4, ("evaluation", "ladder", "run_page", "tuning")),
    "run_page": (4, ("evaluation", "tuning")),
    "studio": (5, ()),
    "commands": (6, ("cli",)),
    "cli": (6, ("commands",)),
    "__main__": (7, ()),
}
# `edm2` itself has the version number and loads nothing.
FREE = {"__init__"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Parts of edm2 that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "edm2":
                names = [f"edm2.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("edm2."):
                found.add(name.split(".")[1])
    return found


FILES = sorted(p for p in SOURCE.rglob("*.py") if part_of(p) not in FREE)


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_obey_the_floors(path: Path) -> None:
    part = part_of(path)
    floor, beside = FLOORS[part]
    for other in imports_of(path) - {part, "__version__"}:
        assert FLOORS[other][0] < floor or other in beside, f"{path}, floor {floor}, imports {other}"


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from edm2 import train, __version__\n    import edm2.nn.layers\n")
    assert imports_of(path) == {"train", "nn", "__version__"}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_does_no_work() -> None:
    loaded = loaded_after("import edm2\nassert edm2.__version__\nassert 'ImageGenerator' in dir(edm2)")
    assert not loaded & {"torch", "numpy", "edm2.ema", "edm2.nn"}


def test_post_hoc_ema_comes_alone() -> None:
    loaded = loaded_after("import edm2.ema")
    others = {name for name in loaded if name.startswith("edm2.") and not name.startswith("edm2.ema")}
    assert not others
    assert not loaded & {"PIL", "matplotlib", "sklearn", "rich", "tyro", "torchvision"}
    basis = loaded_after("import torch, numpy, safetensors.torch")
    more = {name.partition(".")[0] for name in loaded} - {name.partition(".")[0] for name in basis}
    assert more - set(sys.stdlib_module_names) == {"edm2"}


def test_a_network_without_values_is_built_without_the_compiler() -> None:
    """Random numbers on the meta device, and products with them, would take a second to import it."""
    options = "8, 1, 3, model_channels=8, channel_mult=(1,), num_blocks=1, channels_per_head=8"
    build = f"[build_denoiser({options}, config=name) for name in 'ABCDEFG']"
    loaded = loaded_after(
        f"import torch\nfrom edm2.diffusion import build_denoiser\nwith torch.device('meta'): {build}"
    )
    assert not loaded & {"torch._dynamo", "sympy"}


def test_the_overview_comes_without_torch() -> None:
    assert "torch" not in loaded_after("from edm2.cli import main\nmain(['--help'])")


def test_nothing_needs_torchvision() -> None:
    for path in FILES:
        assert "torchvision" not in path.read_text(), path


def test_names_of_the_package_are_lazy() -> None:
    import edm2
    from edm2.generate import ImageGenerator

    assert edm2.ImageGenerator is ImageGenerator
    with pytest.raises(AttributeError, match="module 'edm2' has no attribute 'nonsense'"):
        _ = edm2.nonsense
