"""How near generated images come to the training images: whether a generator copies."""

from typing import NamedTuple

import numpy as np


class Nearest(NamedTuple):
    """The nearest reference of each query.

    Attributes:
        distance: `[N]` float64, root mean square difference of pixels scaled to [0, 1].
        indices: `[N]` int64, which reference it is; the first of equals.
    """

    distance: np.ndarray
    indices: np.ndarray


def nearest_distances(
    queries: np.ndarray, references: np.ndarray, *, skip: np.ndarray | None = None, block: int = 512
) -> Nearest:
    """Nearest reference image of each query image, by pixels.

    Args:
        queries: `[N, ...]` uint8.
        references: `[M, ...]` uint8, images of the same shape.
        skip: `[N]` int, a reference that does not count for each query, such as the query itself; None for none.
        block: Number of queries compared at a time; bounds the memory to `block * M` float64.

    Returns:
        Distances, exactly 0 for a copy, and indices.

    Raises:
        ValueError: If the type is wrong, shapes differ, or there are no references.
    """
    for name, images in (("queries", queries), ("references", references)):
        if images.dtype != np.uint8:
            raise ValueError(f"{name} must be uint8 images, not {images.dtype}")
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"queries {list(queries.shape[1:])} and references {list(references.shape[1:])} differ in shape"
        )
    if not len(references):
        raise ValueError("there are no references: at least one is needed to find a nearest one")
    # Whole numbers below 2^53: the expanded square is exact in float64, in any order of summing.
    known = references.reshape(len(references), -1).astype(np.float64)
    known_square = np.square(known).sum(axis=1)
    squared = np.empty(len(queries))
    index = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), block):
        part = queries[start : start + block].reshape(-1, known.shape[1]).astype(np.float64)
        distance = known_square - 2 * (part @ known.T) + np.square(part).sum(axis=1)[:, None]
        rows = np.arange(len(part))
        if skip is not None:
            distance[rows, skip[start : start + block]] = np.inf
        nearest = distance.argmin(axis=1)
        index[start : start + block] = nearest
        squared[start : start + block] = distance[rows, nearest]
    return Nearest(np.sqrt(squared / known.shape[1]) / 255, index)
