"""Batches of a run, read ahead in the background.

The images of a batch depend only on the run's seed and the position. Workers only change when they are read.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edm2.data.dataset import ImageDataset
from edm2.data.order import indices


class Batch(NamedTuple):
    """Consecutive images of a run.

    Attributes:
        position: Position of the first image, in images since the start of the run.
        images: `[B, C, H, W]` uint8 or float32, as stored.
        labels: `[B]` int64, or None if the data set has none.
        conditions: Images given with them, `[B, C', H', W']` as stored, or None.
        vectors: `[B, vector_dim]` float32, or None.
    """

    position: int
    images: Tensor
    labels: Tensor | None = None
    conditions: Tensor | None = None
    vectors: Tensor | None = None

    @classmethod
    def read(
        cls, dataset: ImageDataset, chosen: np.ndarray, position: int, *, seed: int | None = None
    ) -> "Batch":
        """Read images, and what is given with them.

        Args:
            dataset: The data set.
            chosen: `[B]` int64, which images.
            position: Position of the first, in images since the start of the run.
            seed: Seed of the run, for what is drawn anew at each use. Default: as the data set is, whatever the run.
        """
        if seed is None:
            images = dataset.images(chosen)
            given = None if dataset.conditions is None else dataset.conditions.images(chosen)
        else:
            images, given = dataset.drawn(chosen, seed=seed, position=position)
        return cls(
            position,
            torch.from_numpy(images),
            torch.from_numpy(dataset.labels(chosen)) if dataset.num_classes else None,
            None if given is None else torch.from_numpy(given),
            torch.from_numpy(dataset.vectors(chosen)) if dataset.vector_dim else None,
        )


class Batches:
    """Iterator over the batches of a run from any position on, and a context manager that ends its workers.

    Each step covers `batch_size` positions. Each process takes a contiguous share of them, by its rank, in pieces of
    `microbatch`.

    Args:
        dataset: The images.
        batch_size: Images in a step, over all processes.
        seed: Seed of the run, in [0, 2^64).
        start: Position of the first step.
        stop: Position at or after which no step begins; default: none.
        microbatch: Images at a time, a divisor of the share; default: the share.
        rank: Rank of this process, in [0, world_size).
        world_size: Number of processes, a divisor of batch_size.
        workers: Number of background threads; 0 reads in this one. Arrays, which need no decoding, get at most one,
            because more would only wait for each other.
        pin_memory: Whether tensors are page-locked, so that they are copied to a GPU in the background; default: if
            CUDA is available.

    Attributes:
        wait_seconds: Time spent in `next` so far, in seconds.

    Raises:
        ValueError: If the numbers do not fit each other; from `next`, if an image cannot be read.

    Example:
        >>> with Batches(dataset, 256, seed=0, start=num_images) as batches:
        ...     for batch in batches: ...
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
        if not any(part.decodes for part in (dataset, dataset.conditions) if part is not None):
            workers = min(workers, 1)
        self._positions = _positions(batch_size, start, stop, rank * share, share, size)
        self._pending: deque[Future[Batch]] = deque()
        # Two for each worker: one being read, one waiting.
        self._depth = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "edm2-loader") if workers else None
        self._closed = False

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
            raise ValueError(
                "these batches are closed: make new ones, with start at the position that you need"
            )
        if self._pool is None:
            return self._read(next(self._positions))
        while len(self._pending) < self._depth:
            position = next(self._positions, None)
            if position is None:
                break
            self._pending.append(self._pool.submit(self._read, position))
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def _read(self, position: int) -> Batch:
        chosen = indices(position, self._size, size=len(self._dataset), seed=self._seed)
        batch = Batch.read(self._dataset, chosen, position, seed=self._seed)
        if not self._pin:
            return batch
        pinned: list[Any] = [None if tensor is None else tensor.pin_memory() for tensor in batch[1:]]
        return Batch(position, *pinned)


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
