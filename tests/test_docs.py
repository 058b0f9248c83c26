"""What README and docs mention exists: names, arguments, files, commands and their options."""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Everything in which people read words of ours.
TEXTS = sorted(
    path
    for folder in ("src", "tests", "docs", "benchmarks", "examples", ".github", ".")
    for path in (ROOT / folder).glob("*" if folder == "." else "**/*")
    if path.suffix in (".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".css", ".html", ".jinja")
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def find(dotted: str) -> Any:
    """The object of a dotted name; a field of a dataclass stands for itself; None where there is none.

    Raises:
        ImportError: If it needs a package that is not installed here.
    """
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.startswith("edm2"):
                continue
            raise
        for part in parts[i:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return found.__dataclass_fields__[part]
            found = getattr(found, part, None)
        return found
    return None


def exists(dotted: str) -> bool:
    """Whether there is a module, or a name in one, of that name; imported only if the source does not say it."""
    module, _, name = dotted.rpartition(".")
    file, folder = ROOT / "src" / f"{module.replace('.', '/')}.py", ROOT / "src" / dotted.replace(".", "/")
    if folder.is_dir() or folder.with_suffix(".py").exists():
        return True
    if file.exists() and re.search(rf"^(?:class |def )?{name}\b", file.read_text(), re.MULTILINE):
        return True
    try:
        return find(dotted) is not None
    except ImportError:  # of a package that is not installed here
        return True


@every_page
def test_names_exist(path: Path) -> None:
    text = path.read_text()
    names = set(re.findall(r"(?<![\w/.])edm2(?:\.[A-Za-z_]\w*)+", text))
    for module, imported in re.findall(r"^\s*from (edm2[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        names |= {f"{module}.{name}" for name in re.findall(r"\w+", imported)}
    assert [name for name in sorted(names) if not exists(name)] == []


def wrong_arguments(code: str, imported: dict[str, str]) -> list[str]:
    """Keyword arguments that functions of edm2 do not take.

    Args:
        code: A block of Python; imports in it are added to `imported`.
        imported: Name in the code -> dotted name.
    """
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edm2"):
            imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            dotted = ".".join(filter(None, [imported.get(first, first), rest]))
            # Callbacks take seconds to import; tests/integrations runs their examples.
            if not dotted.startswith("edm2.") or dotted.startswith("edm2.ema.callbacks."):
                continue
            with contextlib.suppress(ImportError, ValueError, TypeError):
                takes = inspect.signature(find(dotted)).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                    wrong += [f"{dotted}({k.arg}=)" for k in node.keywords if k.arg not in (None, *takes)]
    return wrong


@every_page
def test_python_fits_the_signatures(path: Path) -> None:
    imported: dict[str, str] = {}
    blocks = [body for kind, body in BLOCK.findall(path.read_text()) if kind == "python"]
    assert [x for block in blocks for x in wrong_arguments(block, imported)] == []


def anchors(path: Path) -> set[str]:
    """What links to headings of a page end in."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_page
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = BLOCK.sub("", path.read_text())
    for to in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in to:
            continue
        name, _, anchor = to.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), to
        assert not anchor or anchor in anchors(page), to


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    named = set(re.findall(r"^([\w/]+)$", index, re.MULTILINE))
    pages = {str(p.relative_to(ROOT / "docs"))[:-3] for p in (ROOT / "docs").rglob("*.md")}
    assert named == pages - {"index"}


def test_every_command_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for name, inner in COMMANDS.items():
        for word in filter(None, inner) if isinstance(inner, dict) else [""]:
            assert re.search(rf"^```{{command-help}} {name} ?{word}\b", text, re.MULTILINE), (name, word)


def dangling(text: str) -> list[str]:
    """References to documents outside of the repository, and to files, tests and names that do not exist."""
    outside = "|".join(("SPE" + "C", "LADDE" + "R", "FIEL" + "D", "DESIG" + "N", "ROW" + "S"))
    found = re.findall(rf"(?<![\w-])(?:{outside})(?:\.md)?(?![\w-])|(?<![\w.])/work/\w+", text)
    file = r"(?<![\w/.-])((?:src|tests|docs|benchmarks|examples)/[\w./-]*\w\.(?:py|md|ipynb|png))(?:::(\w+))?"
    for path, test in re.findall(file, text):
        if not (ROOT / path).exists() or (test and f"def {test}(" not in (ROOT / path).read_text()):
            found.append(f"{path}::{test}" if test else path)
    names = re.findall(r"`(edm2(?:\.[A-Za-z_]\w*)+)(?:\(|`)", text)
    return found + [name for name in sorted(set(names)) if ".NAME" not in name and not exists(name)]


def test_no_reference_leads_nowhere() -> None:
    assert len(TEXTS) > 300
    found = {str(path.relative_to(ROOT)): dangling(path.read_text()) for path in TEXTS}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_reference_that_leads_nowhere_is_seen() -> None:
    assert (
        dangling("Ref: EDM2 Eq. 4; docs/ema.md; `edm2.ema.PowerEMA`; tests/test_docs.py::test_names_exist")
        == []
    )
    assert dangling("see " + "SPE" + "C section 4") == ["SPE" + "C"]
    assert dangling("see docs/" + "emas.md") == ["docs/" + "emas.md"]
    assert dangling("tests/test_docs.py::" + "test_nothing") == ["tests/test_docs.py::" + "test_nothing"]
    assert dangling("`edm2.ema." + "Nothing`") == ["edm2.ema." + "Nothing"]


@functools.cache
def help_of(*words: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return text.getvalue()


def commands_in(text: str) -> list[list[str]]:
    """The words of every `edm2` command in blocks of shell code."""
    blocks = [body for kind, body in BLOCK.findall(text) if kind in ("", "sh", "bash", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        start = re.search(r"(?:^|-m )(edm2 .*)", line.strip())
        if start:
            found.append(shlex.split(start[1].split(" | ")[0], comments=True)[1:])
    return found


@every_page
def test_commands_and_options_exist(path: Path) -> None:
    text = path.read_text()
    inline = [shlex.split(words)[1:] for words in re.findall(r"`(edm2 [\w \-.,:/]+)`", text)]
    for words in [*commands_in(text), *inline]:
        if not words or words[0] not in COMMANDS:
            assert not words or words[0].startswith("-") or words[0].isupper(), words
            continue
        inner = isinstance(COMMANDS[words[0]], dict)
        name = words[: 2 if inner else 1]
        if len(name) < 1 + inner or name[-1] == "...":
            continue
        if inner:
            assert name[1] in COMMANDS[name[0]], words
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert [option for option in options if option not in help_of(*name)] == [], words


def test_a_mistake_in_the_docs_would_be_seen() -> None:
    assert find("edm2.ema.PowerEMA") is not None
    assert find("edm2.ema.PowerEMAs") is None
    assert find("edm2.emas") is None
    assert exists("edm2.ema.tracking.tracker")
    assert not exists("edm2.ema.PowerEMAs")
    assert len(commands_in(DOCS[0].read_text())) >= 7
    assert "--sigma-rel" in help_of("ema", "reconstruct")
    assert "--sigma-rels" not in help_of("ema", "reconstruct")
    code = "from edm2.ema import PowerEMA\nPowerEMA(model, sigma_rels=(0.1,), widths=(0.1,))"
    assert wrong_arguments(code, {}) == ["edm2.ema.PowerEMA(widths=)"]
    assert wrong_arguments("import edm2.ema\nedm2.ema.PowerEMA(model, widths=1)", {}) != []


def width(decay: float, updates: int) -> float | None:
    """Width of an average of constant decay, relative to the run; None if the first weights hold over 1%."""
    age = np.arange(updates + 1)
    share = np.append((1 - decay) * decay ** age[:-1], decay**updates)
    mean = (share * age).sum()
    return None if share[-1] > 0.01 else float(np.sqrt((share * (age - mean) ** 2).sum()) / updates)


def test_table_of_decays() -> None:
    text = (ROOT / "docs" / "ema.md").read_text()
    head = re.search(r"^\| decay .*$", text, re.MULTILINE)
    assert head is not None
    lengths = [int(n.replace(",", "")) for n in re.findall(r"N = ([\d,]+)", head[0])]
    rows = re.findall(r"^\| (0\.9\d+) \| ([\d,]+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for decay, averaged, cells in rows:
        assert round(1 / (1 - float(decay))) == int(averaged.replace(",", ""))
        for n, cell in zip(lengths, cells.split(" | "), strict=True):
            wanted = width(float(decay), n)
            assert cell == "-" if wanted is None else float(cell) == pytest.approx(wanted, rel=5e-3)
