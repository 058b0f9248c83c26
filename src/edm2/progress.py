"""Progress of long work: a live bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Shows how far a piece of work is; a context manager.

    Args:
        description: what is being done, a few words.
        total: units of work in all.
        unit: name of a unit, for the rate.
        done: units that were done before.
        interval: seconds between plain lines where the stream is no terminal.
        stream: where to write; standard error by default.
        quiet: show nothing.

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
        self.quiet = quiet
        self._start = self._shown = time.monotonic()
        self._fields = ""
        self._bar: object = None

    def __enter__(self) -> "Progress":
        self._start = self._shown = time.monotonic()
        if not self.quiet and self.stream.isatty():
            self._open_bar()
        return self

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count `count` more units as done and show `fields` beside the rate.

        Args:
            count: units done since the last call.
            **fields: current values worth seeing; floats are rounded. Without any, the last ones stay.
        """
        self.done += count
        if fields:
            self._fields = "  ".join(
                f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
                for name, value in fields.items()
            )
        if self._bar is not None:
            self._bar.update(0, completed=self.done, fields=self._fields, rate=self.rate)  # type: ignore[attr-defined]
        elif not self.quiet and time.monotonic() - self._shown >= self.interval:
            self._shown = time.monotonic()
            print(self.line(), file=self.stream, flush=True)

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """The state as one line of text."""
        left = (self.total - self.done) / self.rate if self.done > self._first else float("nan")
        share = 100 * self.done / max(self.total, 1)
        text = f"{self.description}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f}%), "
        text += f"{self.rate:,.4g} {self.unit}/s, {time_text(left)} left"
        return f"{text}, {self._fields}" if self._fields else text

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
        elif not self.quiet and kind is None:
            took = time_text(time.monotonic() - self._start)
            text = f"{self.description}: {self.done - self._first:,} {self.unit} in {took}"
            print(f"{text}, {self._fields}" if self._fields else text, file=self.stream, flush=True)

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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.4g} " + self.unit + "/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
            console=Console(file=self.stream),
        )
        bar.add_task(self.description, total=self.total, completed=self.done, rate=0.0, fields="")
        bar.start()
        self._bar = bar


def time_text(seconds: float) -> str:
    """Seconds for people: `7 s`, `3 min 05 s`, `2 h 10 min`; `?` where unknown."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
