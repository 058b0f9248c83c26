"""Options that every command takes."""

import pytest
import torch

from edm2.cli import main
from edm2.commands.common import take_common, take_option
from edm2.commands.sampling import Sampling


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert take_common("edm2 sample", ["run", "--threads", "3", "--out", "x"]) == ["run", "--out", "x"]
    assert take_common("edm2 tune", ["--threads=1"]) == []
    assert chosen == [3, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads 0 must be a whole number of at least 1"),
        (["--threads", "two"], "--threads two must be"),
        (["--threads"], "--threads needs a value"),
        (["--threads", "1", "--threads=2"], r"--threads is given 2 times \(1, 2\): give it once"),
        (["--network-from", "make"], "'make' must be MODULE:FUNCTION"),
    ],
)
def test_bad_values(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_common("edm2 sample", words)


def test_other_words_stay() -> None:
    assert take_option("--config", ["--config", "A", "--config-x", "B"]) == ("A", ["--config-x", "B"])
    assert take_option("--config", ["a", "b"]) == (None, ["a", "b"])


def test_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "--threads N" in capsys.readouterr().out


def test_help_wraps_descriptions_and_leaves_defaults_to_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = dict(Sampling.__annotations__)
    for _ in range(2):  # the second time as the first: the classes are as they were
        with pytest.raises(SystemExit):
            main(["sample", "--help"])
        told = capsys.readouterr().out
        assert "(default: None)" not in told
        assert "(default: 250)" in told
        lines = [line.strip("│ ") for line in told.splitlines()]
        guide = lines.index(next(line for line in lines if line.startswith("--guide {None}")))
        assert all(len(line) > 60 for line in lines[guide : guide + 2])
        assert Sampling.__annotations__ == before
