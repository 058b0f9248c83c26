"""Stopping in good order when the system or the user asks for it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# torchrun passes a signal on to processes that srun, or a shell, may have sent it to already.
_ECHO_SECONDS = 5.0


class Stopped(Exception):
    """The run was asked to stop by a signal; it saved a checkpoint first."""


def under_torchrun() -> bool:
    """Whether torchrun started this process and watches how it ends."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; the second one acts at once.

    Under torchrun a signal often comes twice, so that there the second one counts after some seconds only.
    """
    received: list[float] = []
    echo = _ECHO_SECONDS if under_torchrun() else 0.0
    previous: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if received and now < received[0] + echo:
            return
        if received or not echo:
            restore()
        if received:
            signal.raise_signal(number)
        received.append(now)

    try:
        for number in previous:
            signal.signal(number, handle)
    except ValueError:  # not the main thread: signals stay with whoever owns it
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        restore()
