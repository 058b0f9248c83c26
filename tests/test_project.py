"""Files about the project name things that exist: make targets, tests, copied files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def targets_in(text: str) -> set[str]:
    return {word for line in re.findall(r"\bmake ([a-z][a-z -]*[a-z])", text) for word in line.split()}


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_automation_calls_targets_that_exist(path: Path) -> None:
    called = set(re.findall(r"^(?: +- run: )?make ([\w-]+)", path.read_text(), re.MULTILINE))
    assert called
    assert called <= TARGETS


def test_the_ci_runs_every_check() -> None:
    called = targets_in((ROOT / ".ci" / "run").read_text())
    assert {"lint", "type", "test-all", "docs", "test-installed"} <= called


def test_help_lists_every_target() -> None:
    listed = set(re.findall(r"@echo 'make ([\w-]+)", (ROOT / "Makefile").read_text()))
    assert listed == TARGETS - {"help"}


@pytest.mark.parametrize("name", ["SECURITY.md", "CONTRIBUTING.md"])
def test_commands_name_tests_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    found = re.findall(r"\btests/[\w/]+\.py", text)
    assert found
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_the_image_copies_files_that_exist() -> None:
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name
            assert f"!{name}\n" in ignored


def test_versions_agree() -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "src/edm2/__init__.py").read_text())
    assert version
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
