"""Whether a generator copies its training images, by distances to the nearest of them.

Ref: Alaa et al. 2022 (arXiv 2102.08921); Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675).
"""

import math
from dataclasses import dataclass

import numpy as np

from edm2.metrics.neighbours import Nearest, nearest_distances

NEAR = 0.01
"""Share of held-out images that counts as near: samples nearer than these are suspected."""
_MOST_SUSPECTS, _LEAST_C_T = 0.05, -3.0
_MOST_LEFT_OUT = 5000


@dataclass(frozen=True, kw_only=True)
class CopyCheck:
    """Whether samples are copies, judged by their nearest training images.

    Attributes:
        nearest: Nearest training image of each sample.
        suspects: Share of the samples that are nearer to a training image than 99% of held-out images are; 0.01 is
            expected of a generator that does not copy, and 1 of copies.
        authentic: Share of the samples that are further from their nearest training image than that one is from its
            own nearest (AuthPct); 0 for copies, about a half for new images of the same kind.
        c_t: Data-copying test C_T, with one cell: the z-score of a Mann-Whitney test that samples are as far from the
            training images as held-out images are. Below -3 they are nearer than chance can explain.
        median: Median distance of the samples to the training images, RMS of pixels scaled to [0, 1].
        median_held_out: The same for held-out images.
        left_out: Whether training images stood in for held-out ones: each distance is to the
            nearest other one.
    """

    nearest: Nearest
    suspects: float
    authentic: float
    c_t: float
    median: float
    median_held_out: float
    left_out: bool

    @property
    def is_copying(self) -> bool:
        """Whether copies are more than can be expected by chance: `suspects` above 0.05 and `c_t` below -3."""
        return self.suspects > _MOST_SUSPECTS and self.c_t < _LEAST_C_T

    @property
    def verdict(self) -> str:
        """One sentence in plain words."""
        share = f"{100 * self.suspects:.0f}% of the samples are nearer to a training image than 99% of "
        share += "the training images are to each other" if self.left_out else "held-out images are"
        if not self.is_copying:
            return f"no sign of copying: {share} (1% is expected)"
        return (
            f"the model copies its training images: {share} (1% is expected); train on more images, for a shorter "
            "time, with augmentation or dropout, or a smaller network"
        )


def check_copies(
    samples: np.ndarray, training: np.ndarray, held_out: np.ndarray | None = None, *, seed: int = 0
) -> CopyCheck:
    """Compare the distances of samples to the training images with those of images that the model has not seen.

    Distances are of pixels. They find copies that are shifted or recoloured only by chance; look at the pictures.

    Args:
        samples: `[N, ...]` uint8.
        training: `[M, ...]` uint8, at least 2.
        held_out: `[K, ...]` uint8. None: training images stand for them, up to 5000 drawn at random, each without
            itself. Duplicates in the training set then hide copies.
        seed: Seed of that draw.

    Raises:
        ValueError: For fewer than 1 sample, 2 training images or 1 held-out image, or images that do not fit.
    """
    for name, images, least in (
        ("samples", samples, 1),
        ("training", training, 2),
        ("held_out", held_out, 1),
    ):
        if images is not None and len(images) < least:
            raise ValueError(
                f"{name}: {len(images)} images are too few to look for copies, at least {least} needed"
            )
    nearest = nearest_distances(samples, training)
    found = np.unique(nearest.indices)
    own = np.full(len(training), np.nan)
    own[found] = nearest_distances(training[found], training, skip=found).distance
    if held_out is None:
        count = min(len(training), _MOST_LEFT_OUT)
        rows = np.random.default_rng(seed).choice(len(training), count, replace=False)
        held = nearest_distances(training[rows], training, skip=rows).distance
    else:
        held = nearest_distances(held_out, training).distance
    return CopyCheck(
        nearest=nearest,
        suspects=float((nearest.distance < np.quantile(held, NEAR)).mean()),
        authentic=float((nearest.distance > own[nearest.indices]).mean()),
        c_t=rank_z_score(nearest.distance, held),
        median=float(np.median(nearest.distance)),
        median_held_out=float(np.median(held)),
        left_out=held_out is None,
    )


def rank_z_score(a: np.ndarray, b: np.ndarray) -> float:
    """Z-score of the Mann-Whitney test that values of `a` are as large as those of `b`: negative where smaller.

    Ties count half, and the variance allows for them. 0 if all values are equal.

    Ref: Mann and Whitney 1947; Meehan et al. 2020, Eq. 1.
    """
    n, m = len(a), len(b)
    ordered = np.sort(b)
    below, upto = np.searchsorted(ordered, a, "left"), np.searchsorted(ordered, a, "right")
    u = float((below + upto).sum()) / 2
    ties = np.unique(np.concatenate([a, b]), return_counts=True)[1].astype(np.float64)
    total = n + m
    variance = n * m / 12 * ((total + 1) - (ties**3 - ties).sum() / (total * (total - 1)))
    return (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
