"""Stopping in good order when the system or the user asks for it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """The run was asked to stop by a signal; it saved a checkpoint first."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; the second one acts at once."""
    received: list[int] = []
    try:
        previous: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: object) -> None:
            received.append(number)
            for known, handler in previous.items():
                signal.signal(known, handler)

        for number in previous:
            signal.signal(number, handle)
    except ValueError:  # not the main thread: signals stay with whoever owns it
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
