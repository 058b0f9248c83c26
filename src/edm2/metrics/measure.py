"""From images to features to scores, in a stream and over any number of processes."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from edm2.metrics.extractors import FeatureExtractor
from edm2.metrics.frechet import FeatureStatistics, frechet_distance
from edm2.metrics.kernel import KernelDistance, kernel_distance
from edm2.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall

MANIFOLD_K, DENSITY_K = 3, 5
SUBSET_SIZE, NUM_SUBSETS = 1000, 100
KEPT_FEATURES = 10_000


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of a set of images.

    Attributes:
        statistics: Mean and covariance over all images.
        features: `[K, D]` float32, of some or all images, for measures that need more than moments; None for none.
    """

    statistics: FeatureStatistics
    features: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Distances of generated images from a reference.

    Attributes:
        frechet: Frechet distance, over all images.
        kernel: Kernel distance, like the rest over the features that both sets keep; None where one has none.
        manifold: Precision and recall, k = 3.
        support: Density and coverage, k = 5.
    """

    frechet: float
    kernel: KernelDistance | None = None
    manifold: PrecisionRecall | None = None
    support: DensityCoverage | None = None


def kept_rows(num_images: int, keep: int, *, seed: int = 0) -> np.ndarray:
    """Choose the images whose features are kept: all, or a sorted random choice that depends on the seed alone."""
    if num_images <= keep:
        return np.arange(num_images)
    # At random and not evenly spaced: the classes of generated images often repeat with a fixed step.
    return np.sort(np.random.default_rng(seed).choice(num_images, keep, replace=False))


def measure(
    extractor: FeatureExtractor, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, rows: np.ndarray
) -> FeatureSet:
    """Extract the features of images that arrive in batches.

    With `torch.distributed` every process gives its own share of the images, in the order of the ranks, and
    all get the measurement of the whole.

    Args:
        extractor: What makes the features.
        batches: Indices `[B]` in the whole set, ascending over the batches, and images `[B, C, H, W]` uint8.
        rows: Indices whose features are kept, as of `kept_rows`.

    Returns:
        Statistics of all and features of some.

    Raises:
        ValueError: As in the extractor, or if features are not finite.
    """
    statistics, kept = FeatureStatistics(extractor.num_features), [np.empty((0, extractor.num_features))]
    for indices, images in batches:
        features = extractor.features(images)
        statistics.update(features)
        kept.append(features.float().numpy()[np.isin(indices, rows)])
    part = np.concatenate(kept).astype(np.float32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        statistics.all_reduce()
        parts: list[np.ndarray] = [part] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        part = np.concatenate(parts)  # in the order of the ranks
    return FeatureSet(statistics=statistics, features=part if len(part) else None)


def score(generated: FeatureSet, reference: FeatureSet, *, seed: int = 0) -> Scores:
    """All numbers that two sets of features allow.

    Args:
        generated: The images to judge.
        reference: What they should be like.
        seed: Seed of the kernel distance's subsets.

    Returns:
        The scores. Subsets of the kernel distance have 1000 images, or, with a warning, those of the smaller set.

    Raises:
        ValueError: If there are too few images, or features are from different extractors.
    """
    frechet = frechet_distance(generated.statistics, reference.statistics)
    made, real = generated.features, reference.features
    if made is None or real is None:
        return Scores(frechet=frechet)
    size = min(len(made), len(real), SUBSET_SIZE)
    if size < SUBSET_SIZE:
        warnings.warn(
            f"subsets of the kernel distance have {size} images each, all there are, instead of {SUBSET_SIZE}",
            stacklevel=2,
        )
    return Scores(
        frechet=frechet,
        kernel=kernel_distance(real, made, subset_size=size, num_subsets=NUM_SUBSETS, seed=seed),
        manifold=precision_recall(real, made, k=MANIFOLD_K),
        support=density_coverage(real, made, k=DENSITY_K),
    )
