"""What the user sees: answers, remarks, and the progress of long work."""

import contextlib
import sys
import time
from types import TracebackType
from typing import Any, TextIO

# What a stream raises whose terminal or reader has gone, and one that is closed.
_BROKEN = (OSError, ValueError)


def clean(text: object, *, keep: str = "\n") -> str:
    r"""Replace characters that a terminal would obey or cannot show by their escapes.

    File names, class names and texts from files can hold such characters.

    Args:
        text: Anything; its `str` is taken.
        keep: Characters that stay although they are not printable.

    Returns:
        The text, with an escape such as `\x1b` for each character that is not printable.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def show(text: object) -> None:
    """Print an answer on standard output, cleaned; a reader that has gone raises BrokenPipeError."""
    print(clean(text), flush=True)


def tell(text: object) -> None:
    """Print a remark on standard error, cleaned; a stream that cannot be written does not stop the work."""
    with contextlib.suppress(*_BROKEN):
        print(clean(text), file=sys.stderr, flush=True)


class Progress:
    """A context manager that shows how far a piece of work is: a live bar on a terminal, plain lines elsewhere.

    A stream that is closed, or fails, is written no more; the work goes on.

    Args:
        description: What is being done, a few words.
        total: Units of work in all; 0 if that is not known.
        unit: Name of a unit, for the rate.
        done: Units done in earlier sessions.
        interval: Seconds between plain lines.
        stream: Where to write; standard error by default.
        quiet: Whether to show nothing.

    Example:
        >>> with Progress("training", 1000, "images") as progress:
        ...     progress.advance(64, loss=0.9)
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._first = done
        self.interval = interval
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet or self.stream is None
        self._start = self._shown = time.monotonic()
        self._fields = ""
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._shown = time.monotonic()
        with contextlib.suppress(*_BROKEN):
            if not self.quiet and self.stream.isatty():
                self._open_bar()
        return self

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count `count` more units as done and show `fields` after the rate.

        Args:
            count: Units done since the last call.
            **fields: Current values worth seeing; floats are rounded. Without any, the last ones stay.
        """
        self.done += count
        if fields:
            self._fields = "  ".join(
                f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
                for name, value in fields.items()
            )
        if self._bar is not None:
            self._bar.update(0, completed=self.done, fields=clean(self._fields), rate=self.rate)
        elif time.monotonic() - self._shown >= self.interval:
            self._shown = time.monotonic()
            self._write(self.line())

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """The state as one line of text."""
        left = (self.total - self.done) / self.rate if self.done > self._first else float("nan")
        share = 100 * self.done / max(self.total, 1)
        text = f"{self.description}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f}%), "
        text += f"{self.rate:,.4g} {self.unit}/s, {time_text(left)} left"
        if not self.total:  # not known
            text = f"{self.description}: {self.done:,} {self.unit}, {self.rate:,.4g} {self.unit}/s"
        return f"{text}, {self._fields}" if self._fields else text

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(*_BROKEN):
                self._bar.stop()
        elif kind is None:
            took = time_text(time.monotonic() - self._start)
            text = f"{self.description}: {self.done - self._first:,} {self.unit} in {took}"
            self._write(f"{text}, {self._fields}" if self._fields else text)

    def _write(self, line: str) -> None:
        if self.quiet:
            return
        try:
            print(clean(line), file=self.stream, flush=True)
        except _BROKEN:
            self.quiet = True

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.4g} " + self.unit + "/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}", markup=False),
            console=Console(file=self.stream),
        )
        bar.add_task(clean(self.description), total=self.total, completed=self.done, rate=0.0, fields="")
        bar.start()
        self._bar = bar


def time_text(seconds: float) -> str:
    """A duration in words: `7 s`, `3 min 05 s`, `2 h 10 min`; `?` for NaN."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
