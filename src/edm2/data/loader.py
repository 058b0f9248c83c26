"""Batches of a run, read ahead in the background.

Which images a batch holds follows from the run's seed and the position alone; workers only change when they
are read.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edm2.data.dataset import ImageDataset
from edm2.data.order import indices
from edm2.data.workers import process_pool, result_of


class Batch(NamedTuple):
    """Images that stand beside each other in a run.

    Attributes:
        position: of the first, in images since the start of the run.
        images: `[B, C, H, W]` uint8 or float32, as stored.
        labels: `[B]` int64, or None where the data set has none.
    """

    position: int
    images: Tensor
    labels: Tensor | None


class Batches:
    """Iterator over the batches of a run from any position on; a context manager that ends its workers.

    Each step covers `batch_size` positions. Of those, a process takes the contiguous share that its rank names,
    and gets it in pieces of `microbatch`.

    Args:
        dataset: the images.
        batch_size: images a step, over all processes.
        seed: of the run, in [0, 2^64).
        start: position of the first step.
        stop: position at or after which no step begins; default: never.
        microbatch: images at a time, a divisor of the share; default: the share.
        rank: of this process among `world_size`.
        world_size: number of processes, a divisor of batch_size.
        workers: in the background; 0 reads when asked.
        processes: workers are processes instead of threads. They pay where reading is Python code that holds
            the interpreter; decoding by Pillow and NumPy mostly does not. A script that uses them needs
            `if __name__ == "__main__":`.
        pin_memory: page-locked tensors, which are copied to a GPU in the background; default: where there is CUDA.

    Attributes:
        wait_seconds: time spent in `next` so far.

    Raises:
        ValueError: for numbers that do not fit each other; from `next`, for an image that cannot be read.
        ChildProcessError: from `next`, where a worker process was killed.

    Example:
        >>> with Batches(dataset, 256, seed=0, start=num_images) as batches:
        ...     for position, images, labels in batches: ...
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        stop: int | None = None,
        microbatch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        processes: bool = False,
        pin_memory: bool | None = None,
    ) -> None:
        share = _share(batch_size, rank, world_size)
        size = share if microbatch is None else microbatch
        if size < 1 or share % size:
            raise ValueError(f"microbatch {size} must be a divisor of the {share} images of a process")
        if start < 0 or workers < 0:
            raise ValueError(f"start {start} and workers {workers} must not be negative")
        self.wait_seconds = 0.0
        self._dataset, self._seed, self._size = dataset, seed, size
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._positions = _positions(batch_size, start, stop, rank * share, share, size)
        self._processes = processes and workers > 0
        self._pending: deque[tuple[int, Future[_Arrays]]] = deque()
        # Two a worker: one being read, one waiting for its turn.
        self._depth = 2 * workers
        self._pool: Executor | None = None
        self._closed = False
        if self._processes:
            self._pool = process_pool(workers, _prepare, dataset)
        elif workers:
            self._pool = ThreadPoolExecutor(workers, "edm2-loader")

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return self._next()
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        """End the workers; the iterator cannot be used afterwards."""
        self._closed = True
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> Batch:
        if self._closed:
            raise ValueError("these batches are closed: make new ones that start at the position wanted")
        if self._pool is None:
            position = next(self._positions)
            return self._batch(position, _read(self._dataset, self._chosen(position)))
        while len(self._pending) < self._depth:
            position_ahead = next(self._positions, None)
            if position_ahead is None:
                break
            self._pending.append((position_ahead, self._submit(self._pool, position_ahead)))
        if not self._pending:
            raise StopIteration
        position, future = self._pending.popleft()
        return self._batch(position, result_of(future))

    def _chosen(self, position: int) -> np.ndarray:
        return indices(position, self._size, size=len(self._dataset), seed=self._seed)

    def _submit(self, pool: Executor, position: int) -> "Future[_Arrays]":
        if self._processes:
            return pool.submit(_read_in_worker, self._chosen(position))
        return pool.submit(self._read_and_pin, position)

    def _read_and_pin(self, position: int) -> "_Arrays":
        return self._pinned(_read(self._dataset, self._chosen(position)))

    def _pinned(self, arrays: "_Arrays") -> "_Arrays":
        if not self._pin or arrays[0].is_pinned():
            return arrays
        images, labels = arrays
        return images.pin_memory(), None if labels is None else labels.pin_memory()

    def _batch(self, position: int, arrays: "_Arrays") -> Batch:
        return Batch(position, *self._pinned(arrays))


_Arrays = tuple[Tensor, Tensor | None]


def _share(batch_size: int, rank: int, world_size: int) -> int:
    if batch_size < 1 or world_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of world_size {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must be in [0, {world_size})")
    return batch_size // world_size


def _positions(
    batch_size: int, start: int, stop: int | None, offset: int, share: int, size: int
) -> Iterator[int]:
    step = start
    while stop is None or step < stop:
        yield from range(step + offset, step + offset + share, size)
        step += batch_size


def _read(dataset: ImageDataset, chosen: np.ndarray) -> _Arrays:
    images = torch.from_numpy(dataset.images(chosen))
    return images, torch.from_numpy(dataset.labels(chosen)) if dataset.num_classes else None


# Of a worker process.
_dataset: ImageDataset | None = None


def _prepare(dataset: ImageDataset) -> None:
    global _dataset
    _dataset = dataset


def _read_in_worker(chosen: np.ndarray) -> _Arrays:
    assert _dataset is not None
    return _read(_dataset, chosen)
