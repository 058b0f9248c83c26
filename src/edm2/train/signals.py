"""A clean stop when the system or the user asks for one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# torchrun forwards signals to processes that may have received them already, from srun or a shell.
_ECHO_SECONDS = 5.0


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


def under_torchrun() -> bool:
    """Return whether torchrun started this process and watches its exit code."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the current step; the second acts at once.

    Under torchrun a signal often arrives twice, so the second one counts only after a few seconds.
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
    except ValueError:  # not the main thread: leave its signal handlers alone
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        restore()
