"""How much of one set of features lies where another is dense, by balls that reach to nearest neighbours."""

from typing import NamedTuple

import numpy as np

from edm2.metrics.frechet import check_features
from edm2.metrics.kernel import tiles


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: Share of generated images inside a ball around a real one: fidelity.
        recall: Share of real images inside a ball around a generated one: variety.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Fidelity and variety that one outlier among the real images does not change.

    Attributes:
        density: Mean number of real balls that hold a generated image, over k; about 1 for a perfect generator,
            and not bounded by 1.
        coverage: Share of real images whose ball holds a generated one, in [0, 1].
    """

    density: float
    coverage: float


def precision_recall(
    real: np.ndarray, generated: np.ndarray, *, k: int = 3, block: int = 2048
) -> PrecisionRecall:
    """Improved precision and recall.

    The ball of an image reaches to its k-th nearest neighbour in its own set, that distance included.

    Args:
        real: `[N, D]` features.
        generated: `[M, D]` features by the same extractor. Both numbers change the result: compare only
            results of equal numbers.
        k: From 1 to one less than the smaller number of images.
        block: Images compared at a time; bounds the memory to `block * (block + 2 D)` float64.

    Returns:
        Both shares.

    Raises:
        ValueError: If features do not fit, or are too few for k.

    Ref: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
    """
    _check(k, real, generated)
    real_radii, generated_radii = _squared_radii(real, k, block), _squared_radii(generated, k, block)
    held, holds = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for rows, columns in tiles(len(real), len(generated), block):
        squared = _squared_distances(real[rows], generated[columns])
        held[columns] |= (squared <= real_radii[rows, None]).any(axis=0)
        holds[rows] |= (squared <= generated_radii[columns]).any(axis=1)
    return PrecisionRecall(float(held.mean()), float(holds.mean()))


def density_coverage(
    real: np.ndarray, generated: np.ndarray, *, k: int = 5, block: int = 2048
) -> DensityCoverage:
    """Density and coverage.

    Args:
        real: `[N, D]` features, more than k.
        generated: `[M, D]` features by the same extractor.
        k: From 1 to one less than the number of real images.
        block: As in `precision_recall`.

    Returns:
        Both.

    Raises:
        ValueError: If features do not fit, or are too few for k.

    Ref: Naeem et al. 2020 (arXiv 2002.09797).
    """
    check_features(real, generated)
    if not len(generated):
        raise ValueError("there are no generated images: density and coverage need at least 1")
    _check(k, real)
    radii = _squared_radii(real, k, block)
    num_held, covered = 0, np.zeros(len(real), bool)
    for rows, columns in tiles(len(real), len(generated), block):
        inside = _squared_distances(real[rows], generated[columns]) <= radii[rows, None]
        num_held += int(inside.sum())
        covered[rows] |= inside.any(axis=1)
    return DensityCoverage(num_held / (k * len(generated)), float(covered.mean()))


def _squared_radii(features: np.ndarray, k: int, block: int) -> np.ndarray:
    # Squared distance of each image to its k-th nearest other one.
    nearest = np.full((len(features), k), np.inf)
    for rows, columns in tiles(len(features), len(features), block):
        squared = _squared_distances(features[rows], features[columns])
        if rows == columns:
            np.fill_diagonal(squared, np.inf)
        found = np.concatenate([nearest[rows], squared], axis=1)
        nearest[rows] = np.partition(found, k - 1, axis=1)[:, :k]
    radii: np.ndarray = nearest.max(axis=1)
    return radii


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # In float64 because the square is expanded: float32 would lose small distances of large features.
    a, b = a.astype(np.float64), b.astype(np.float64)
    squared: np.ndarray = np.square(a).sum(axis=1)[:, None] - 2 * (a @ b.T) + np.square(b).sum(axis=1)
    np.maximum(squared, 0, out=squared)
    return squared


def _check(k: int, *sets: np.ndarray) -> None:
    check_features(*sets)
    smallest = min(len(features) for features in sets)
    if not 1 <= k < smallest:
        raise ValueError(
            f"k {k} must be from 1 to {smallest - 1}, one less than the number of images ({smallest}): use more images"
        )
