"""What a user sees of long work."""

import io

import pytest

from edm2.progress import Progress, time_text


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
    assert Progress("work", 0, "things").line() == "work: 0 of 0 things (0%), 0 things/s, ? left"


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
