"""Read every image once, so that damage is found before training."""

from collections.abc import Iterator, Sequence

import numpy as np

from edm2.data.dataset import ImageDataset, Skipped
from edm2.data.workers import in_threads

_CHUNK = 256
_QUIET_BELOW = 20_000


def find_damaged(
    dataset: ImageDataset, *, workers: int | None = None, quiet: bool | None = None
) -> list[tuple[int, Skipped]]:
    """Decode every image of a data set.

    Args:
        dataset: The data set to check.
        workers: Number of threads; default: one per processor.
        quiet: Whether to show no progress; default: if there are fewer than 20,000 images.

    Returns:
        Index, name and reason for each image that cannot be read, in order.
    """
    quiet = len(dataset) < _QUIET_BELOW if quiet is None else quiet

    def damaged(rows: Sequence[int]) -> list[tuple[int, Skipped]]:
        return list(_damaged(dataset, rows))

    found = in_threads(
        damaged, range(len(dataset)), what="checking images", chunk=_CHUNK, workers=workers, quiet=quiet
    )
    return [one for part in found for one in part]


def _damaged(dataset: ImageDataset, rows: Sequence[int]) -> Iterator[tuple[int, Skipped]]:
    for row in rows:
        for what, part in (("", dataset), ("condition of ", dataset.conditions)):
            try:
                if part is not None:
                    part.images(np.array([row]))
            except ValueError as error:
                yield row, Skipped(f"{what}{dataset.image_name(row)}", str(error.__cause__ or error))
                break
