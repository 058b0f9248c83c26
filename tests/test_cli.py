"""The command line: help at each level, exit codes, and what it says of a mistake."""

import importlib
import keyword
import re
from collections.abc import Iterator
from typing import Any

import pytest

import edm2
from edm2.cli import COMMANDS, main


def leaves() -> Iterator[tuple[str, ...]]:
    for name, text in COMMANDS.items():
        if isinstance(text, dict):
            yield from ((name, word) for word in text if word)
        else:
            yield (name,)


def ends(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    out = capsys.readouterr().out
    assert out.startswith("usage: edm2 COMMAND")
    assert all(name in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == edm2.__version__


def test_every_command_has_its_function() -> None:
    for name, *word in leaves():
        module = importlib.import_module(f"edm2.commands.{name}{'_' * keyword.iskeyword(name)}")
        assert callable(getattr(module, word[0] if word else "run"))


@pytest.mark.parametrize("words", [["demo"], ["sample"], ["info"], ["ema", "reconstruct"]], ids=" ".join)
def test_help_of_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends([*words, "--help"], capsys)
    assert code == 0
    assert f"edm2 {' '.join(words)}" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["smaple"], "error: unknown command edm2 smaple: did you mean sample"),
        (["ema", "reconstrct"], "unknown command edm2 ema reconstrct: did you mean reconstruct"),
        (["zzzz"], "unknown command edm2 zzzz: there are demo, train"),
        ([""], "unknown command edm2 : there are demo"),
        (["info", "digit"], "unknown preset 'digit': did you mean digits?"),
        (["sample", "--sedes", "1"], "--sedes"),
        (["sample"], "--out"),
    ],
)
def test_mistakes_end_with_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(words, capsys)
    assert code == 2
    assert told in text


def test_presets_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    assert "edm2-img512-s\n" in capsys.readouterr().out
    main(["info", "edm2-img512-s"])
    out = capsys.readouterr().out
    assert "parameters  280,212,837" in out
    gflops = float(re.search(r"Gflops +(\S+)", out)[1])  # type: ignore[index]
    assert gflops == pytest.approx(101.918, rel=0.005)
    assert "unet.out_gain" in out
