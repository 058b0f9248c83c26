"""The base install is enough for what it promises, and a missing extra is answered by one line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

from edm2.cli import main
from edm2.extras import EXTRAS, MissingExtra, advice, need, needed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "PIL": "pillow",
    "docstring_parser": "docstring-parser",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", line)[0] for line in requirements}


def test_every_optional_module_has_its_extra() -> None:
    for module, extra in EXTRAS.items():
        assert PACKAGES.get(module, module) in names(PROJECT["optional-dependencies"][extra])
    packages = {PACKAGES.get(module, module) for module in EXTRAS}
    # Tests compare with further libraries, which integrations installs and edm2 never imports.
    for extra in {*EXTRAS.values()} - {"integrations"}:
        assert names(PROJECT["optional-dependencies"][extra]) <= packages
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "safetensors"}


def test_all_holds_every_extra_that_edm2_uses() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert everything == f"edm2[{','.join(dict.fromkeys(EXTRAS.values()))}]"


def test_the_base_install_is_enough_for_the_core() -> None:
    code = f"""
import sys
for name in {list(EXTRAS)}:
    sys.modules[name] = None
import torch, edm2.ema, edm2.nn, edm2.diffusion
ema = edm2.ema.PowerEMA(torch.nn.Linear(2, 2))
ema.update(1)
try:
    import edm2.train
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert re.fullmatch(
        r"edm2\.\w+ needs the package '\w+', which the extra 'cli' installs: .*\n", done.stdout
    )


def test_a_missing_package_is_named_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(MissingExtra) as caught:
        need("sklearn.svm", "the judge", instead=", or leave it out")
    assert str(caught.value) == (
        "the judge needs the package 'scikit-learn', which the extra 'cli' installs: run "
        "`pip install -e '.[cli]'` in a clone of the repository, or "
        "`pip install 'edm2[cli] @ git+ADDRESS'` with its address, or leave it out"
    )
    assert caught.value.name == "sklearn.svm"
    with pytest.raises(MissingExtra, match="the judge"), needed("another"):
        raise caught.value
    assert need("json").loads("1") == 1


def test_other_packages_are_not_ours_to_explain() -> None:
    assert advice(ModuleNotFoundError(name="nonsense")) is None
    assert advice(ModuleNotFoundError()) is None
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        need("nonsense")


@pytest.mark.parametrize("missing", ["tyro", "nonsense"])
def test_commands_answer_in_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("edm2.commands.demo.run", fail)
    with pytest.raises(SystemExit if missing == "tyro" else ModuleNotFoundError) as ended:
        main(["demo"])
    if missing == "tyro":
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("edm2: error: this command needs the package 'tyro', which the extra 'cli'")
        assert told.count("\n") == 1


# The name is unclaimed on the index, where anyone could take it: `edm2 @ ADDRESS` and paths are safe.
BY_NAME = re.compile(
    r"""(?:pip3?|uv|pipx) (?:\w+ )*?(?:install|add)(?: -\S+)* +['"]?edm2(?!\S* @ )(?:\[|\b)"""
)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("pip install edm2", True),
        ("pip install -U 'edm2[hub]'", True),
        ("uv pip install edm2[cli]", True),
        ("pip install -e '.[cli]'", False),
        ("pip install 'edm2[cli] @ git+https://x/y'", False),
        ("pip install 'edm2 @ git+https://x/y'", False),
    ],
)
def test_advice_by_bare_name_would_be_seen(text: str, bare: bool) -> None:
    assert bool(BY_NAME.search(text)) == bare


def test_nothing_advises_an_install_by_bare_name() -> None:
    files = [p for suffix in ("py", "md", "toml", "yml", "ipynb", "cff") for p in ROOT.rglob(f"*.{suffix}")]
    own = [
        p for p in files if not any(part.startswith((".venv", "build")) for part in p.relative_to(ROOT).parts)
    ]
    assert len(own) > 100
    found = [str(p) for p in own if p != Path(__file__) and BY_NAME.search(p.read_text())]
    assert found == []
