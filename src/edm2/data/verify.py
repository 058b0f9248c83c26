"""Read every image once, so that damage is found before training."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edm2.data.dataset import ImageDataset, Skipped
from edm2.progress import Progress

_CHUNK = 256
_QUIET_BELOW = 20_000


def find_damaged(
    dataset: ImageDataset, *, workers: int | None = None, quiet: bool | None = None
) -> list[tuple[int, Skipped]]:
    """Decode every image of a data set.

    Args:
        dataset: The data set to check.
        workers: Number of threads; default: one a processor.
        quiet: Whether to show no progress; default: if there are fewer than 20,000 images.

    Returns:
        Index, name and reason for each image that cannot be read, in order.
    """
    chunks = [np.arange(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    quiet = len(dataset) < _QUIET_BELOW if quiet is None else quiet
    found: list[tuple[int, Skipped]] = []
    with (
        Progress("checking images", len(dataset), "images", quiet=quiet) as progress,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        try:
            results = pool.map(lambda rows: list(_damaged(dataset, rows)), chunks)
            for chunk, damaged in zip(chunks, results, strict=True):
                found += damaged
                progress.advance(len(chunk), damaged=len(found))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _damaged(dataset: ImageDataset, rows: np.ndarray) -> Iterator[tuple[int, Skipped]]:
    for row in rows:
        try:
            dataset.images(np.array([row]))
        except ValueError as error:
            cause = error.__cause__ or error
            yield int(row), Skipped(dataset.image_name(int(row)), str(cause))
