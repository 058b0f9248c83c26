"""Worker processes, which survive the signals that stop their parent and end with it however it dies; threads."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from edm2.progress import Progress

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def process_pool(
    count: int, prepare: Callable[..., None], *arguments: Any, grace: float = 60.0
) -> ProcessPoolExecutor:
    """A pool of processes, each prepared once.

    Args:
        count: Number of processes.
        prepare: Called in each process with the arguments, which must be picklable.
        *arguments: Data that all tasks share, sent once to each process.
        grace: Seconds from SIGTERM to the end of a worker. A signal often goes to the whole process group, while the
            parent may need its workers to finish.
    """
    # Forked children would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _start, (grace, prepare, arguments))


def result_of(future: "Future[_Result]") -> _Result:
    """Return the result of a task, or raise its error.

    Raises:
        ChildProcessError: If a worker was killed.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, often because memory ran out: use fewer workers"
        ) from error


def in_threads(
    function: Callable[[Sequence[_Item]], _Result],
    items: Sequence[_Item],
    *,
    what: str,
    chunk: int,
    workers: int | None = None,
    quiet: bool = False,
) -> Iterator[_Result]:
    """Apply a function to chunks of images in threads, and show the progress.

    Args:
        function: Called with each chunk; its results come in order.
        items: One for each image.
        what: What is being done, for the progress.
        chunk: Images in a chunk.
        workers: Number of threads; default: one per processor.
        quiet: Whether to show no progress.
    """
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    with (
        Progress(what, len(items), "images", quiet=quiet) as progress,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        try:
            for part, result in zip(chunks, pool.map(function, chunks), strict=True):
                yield result
                progress.advance(len(part))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(grace: float, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not ignored, because the pool ends its workers by SIGTERM after one of them was killed.
    signal.signal(signal.SIGTERM, lambda *_: _end_after(grace))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
