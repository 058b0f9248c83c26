"""Worker processes that outlive the signals that stop their parent, and end with it however it dies."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def process_pool(count: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool of processes, each prepared once.

    Args:
        count: number of processes.
        prepare: called in each with the arguments, which must be picklable.
        *arguments: what the tasks share, so that it does not travel with each of them.
    """
    # A forked child would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _start, (prepare, arguments))


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Whoever stops a program signals its whole group; the parent may still need its workers to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
