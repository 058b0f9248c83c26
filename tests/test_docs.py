"""What README and docs mention exists: names, files, commands and their options."""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from edm2.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def exists(dotted: str) -> bool:
    """Whether a module, a name in it, or a field of a class there is called so."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.startswith("edm2"):
                continue
            raise
        for part in parts[i:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_exist(path: Path) -> None:
    text = path.read_text()
    names = set(re.findall(r"(?<![\w/.])edm2(?:\.[A-Za-z_]\w*)+", text))
    for module, imported in re.findall(r"^\s*from (edm2[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        names |= {f"{module}.{name}" for name in re.findall(r"\w+", imported)}
    missing = []
    for name in sorted(names):
        try:
            missing += [] if exists(name) else [name]
        except ImportError:  # of a package that is not installed here, and not ours
            continue
    assert missing == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert [to for to in links if "://" not in to and not (path.parent / to).exists()] == []


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


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    for words in commands_in(path.read_text()):
        if words[0] not in COMMANDS:
            assert words[0].startswith("-"), words
            continue
        inner = isinstance(COMMANDS[words[0]], dict)
        name = words[: 2 if inner else 1]
        if inner:
            assert name[1] in COMMANDS[name[0]], words
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert [option for option in options if option not in help_of(*name)] == [], words


def test_a_mistake_in_the_docs_would_be_seen() -> None:
    assert exists("edm2.ema.PowerEMA")
    assert not exists("edm2.ema.PowerEMAs")
    assert not exists("edm2.emas")
    assert len(commands_in(DOCS[0].read_text())) >= 8
    assert "--sigma-rel" in help_of("ema", "reconstruct")
    assert "--sigma-rels" not in help_of("ema", "reconstruct")
