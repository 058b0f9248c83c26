"""Kernel distance between two sets of features: unbiased at any number of images, unlike a Frechet distance."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from edm2.metrics.frechet import check_features

Tile = tuple[slice, slice]


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy over random subsets.

    Attributes:
        value: Mean over the subsets; may be below 0 if the sets are similar.
        spread: Standard deviation over the subsets, of one subset's value and not of the mean; None where there is
            only one subset, or all are the whole sets.
        subset_size: Images of each set in a subset.
        num_subsets: Number of subsets.
    """

    value: float
    spread: float | None
    subset_size: int
    num_subsets: int


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> KernelDistance:
    """Kernel distance (KID) with the polynomial kernel `(x.y / D + 1)^3`.

    Args:
        a: `[N, D]` features.
        b: `[M, D]` features by the same extractor.
        subset_size: Images drawn from each set without replacement, from 2 to the smaller set's number.
        num_subsets: At least 1.
        seed: Seed of the subsets.

    Returns:
        Mean and spread over the subsets; if subsets are whole sets, there is only one.

    Raises:
        ValueError: If features do not fit, or are too few for a subset.

    Ref: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    check_features(a, b)
    smaller = min(len(a), len(b))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"subset_size {subset_size} must be from 2 to the smaller set's number of images, {smaller}"
        )
    if subset_size == len(a) == len(b):
        return KernelDistance(squared_mmd(a, b), None, subset_size, 1)
    rng = np.random.default_rng(seed)
    values = [
        squared_mmd(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (a, b)))
        for _ in range(num_subsets)
    ]
    spread = float(np.std(values)) if num_subsets > 1 else None
    return KernelDistance(float(np.mean(values)), spread, subset_size, num_subsets)


def squared_mmd(a: np.ndarray, b: np.ndarray, *, block: int = 2048) -> float:
    """Unbiased squared maximum mean discrepancy over all pairs, with the kernel `(x.y / D + 1)^3`.

    Args:
        a: `[N, D]` features, at least 2.
        b: `[M, D]` features, at least 2.
        block: Images compared at a time; bounds the memory to `block * (block + 2 D)` float64.

    Returns:
        The distance; zero in expectation for two samples of one distribution.

    Raises:
        ValueError: If features do not fit, or are fewer than 2.
    """
    check_features(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} images are too few: a kernel distance needs at least 2 each")
    cross, _ = _kernel_sums(a, b, block)
    within = 0.0
    for features in (a, b):
        total, diagonal = _kernel_sums(features, features, block)
        within += (total - diagonal) / (len(features) * (len(features) - 1))
    return within - 2 * cross / (len(a) * len(b))


def _kernel_sums(a: np.ndarray, b: np.ndarray, block: int) -> tuple[float, float]:
    # Over all pairs, and over the pairs of equal index.
    total = diagonal = 0.0
    for rows, columns in tiles(len(a), len(b), block):
        x = a[rows].astype(np.float64)
        # One array twice, which NumPy multiplies in half the time.
        y = x if a is b and rows == columns else b[columns].astype(np.float64)
        kernel = x @ y.T
        kernel /= a.shape[1]
        kernel += 1
        total += float(np.vdot(kernel * kernel, kernel))
        if rows == columns:
            diagonal += float((kernel.diagonal() ** 3).sum())
    return total, diagonal


def tiles(num_rows: int, num_columns: int, block: int) -> Iterator[Tile]:
    """Slices of rows and columns that cover a matrix; square on the diagonal."""
    for row in range(0, num_rows, block):
        for column in range(0, num_columns, block):
            yield (
                slice(row, min(row + block, num_rows)),
                slice(column, min(column + block, num_columns)),
            )
