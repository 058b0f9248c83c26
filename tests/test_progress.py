"""What a user sees of long work."""

import io
import sys

import pytest

from edm2.progress import Progress, clean, show, tell, time_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("edm2.progress.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (7.4, "7 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (float("nan"), "?"),
    ],
)
def test_time_for_people(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_plain_lines_come_at_intervals(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("training", 1000, "images", done=200, interval=10, stream=stream) as progress:
        clock[0] += 4
        progress.advance(100, loss=0.51239, nonfinite_steps=2)
        assert stream.getvalue() == ""
        clock[0] += 6
        progress.advance(100)
        clock[0] += 1
        progress.advance(100)
    lines = stream.getvalue().splitlines()
    # 200 images in 10 seconds, so the other 600 take 30 more.
    assert lines == [
        "training: 400 of 1,000 images (40%), 20 images/s, 30 s left, loss 0.5124  nonfinite steps 2",
        "training: 300 images in 11 s, loss 0.5124  nonfinite steps 2",
    ]


def test_nothing_done_yet(clock: list[float]) -> None:
    assert Progress("work", 0, "things").line() == "work: 0 things, 0 things/s"


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    with Progress("work", 2, "things", interval=0, stream=stream, quiet=True) as progress:
        progress.advance()
    assert stream.getvalue() == ""


def test_no_summary_after_an_error() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("work", 2, "things", stream=stream):
        raise KeyError
    assert stream.getvalue() == ""


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress("sampling", 4, "images", done=1, stream=stream) as progress:
        progress.advance(3, loss=0.25)
    shown = stream.getvalue()
    for part in ("sampling", "4/4", "images/s", "loss 0.25"):
        assert part in shown


def test_quiet_on_a_terminal_shows_nothing() -> None:
    stream = Terminal()
    with Progress("work", 2, "things", stream=stream, quiet=True) as progress:
        progress.advance()
    assert stream.getvalue() == ""


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class GoneTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("stream", [Gone(), GoneTerminal()])
def test_work_goes_on_when_nobody_reads(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Progress("work", 3, "things", interval=0, stream=stream) as progress:
        for _ in range(3):
            progress.advance()
    assert progress.done == 3


def test_work_goes_on_with_a_closed_stream() -> None:
    stream = io.StringIO()
    stream.close()
    with Progress("work", 1, "things", interval=0, stream=stream) as progress:
        progress.advance()


def test_work_goes_on_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("work", 1, "things", interval=0) as progress:
        progress.advance()
    tell("a remark")


def test_a_remark_that_nobody_reads_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    tell("a remark")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain σ, 3 × 4\nnext line", "plain σ, 3 × 4\nnext line"),
        ("\x1b[31mred\x07\r", "\\x1b[31mred\\x07\\r"),
        ("\x9b31m \u202egpj.exe", "\\x9b31m \\u202egpj.exe"),
        ("name \udcff", "name \\udcff"),
        (7, "7"),
    ],
)
def test_characters_that_a_terminal_would_obey(text: object, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_names_stay_on_one_line() -> None:
    assert clean("a\nb: 100 images", keep="") == "a\\nb: 100 images"


def test_all_that_is_printed_is_cleaned(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    show("\x1b[1mA")
    tell("\x1b[1mB")
    with Progress("\x1b[1mC", 1, "things") as progress:
        progress.advance(name="\x1b[1mD")
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[1mA\n"
    assert "\x1b" not in printed.err
    assert all(f"\\x1b[1m{letter}" in printed.err for letter in "BCD")
