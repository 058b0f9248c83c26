"""Rank histograms: where the truth lies among the members, and whether it lies everywhere equally often."""

import numpy as np

from edm2.extras import need


def ranks_of(
    members: np.ndarray, truth: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Histogram of the number of members below the truth.

    Args:
        members: `[M, ..., H, W]`.
        truth: `[..., H, W]`.
        mask: Pixels that count, likewise.
        rng: Draws the rank where members equal the truth, as dry pixels of rain do.

    Returns:
        `[..., M + 1]` counts over the pixels.
    """
    rank = (members < truth).sum(axis=0)
    equal = (members == truth).sum(axis=0)
    if equal.any():
        rank = rank + rng.integers(0, equal + 1)
    return np.stack(
        [((rank == r) & mask).sum(axis=(-2, -1)) for r in range(len(members) + 1)], axis=-1
    ).astype(np.float64)


def flatness(histograms: np.ndarray) -> np.ndarray:
    """Probability that honest ensembles give a rank histogram as uneven as this.

    A chi-square test whose variance is that between cases: pixels of one case are not independent, and a test that
    counts them as such would reject any ensemble. Degrees of freedom by Satterthwaite's approximation.

    Args:
        histograms: `[N, ..., K]` counts of each case.

    Returns:
        `[...]` in [0, 1]; NaN for fewer than three cases.

    Ref: Rao and Scott, Ann. Stat. 12 (1984), the second-order correction.
    """
    chdtrc = need("scipy.special", "the test of a rank histogram").chdtrc
    cases, bins = histograms.shape[0], histograms.shape[-1]
    if cases < 3:
        return np.full(histograms.shape[1:-1], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = histograms.sum(axis=(0, -1))
        share = histograms.sum(axis=0) / total[..., None]
        # Each case's part in the deviation of the shares from 1 / bins.
        parts = (histograms - histograms.sum(axis=-1, keepdims=True) / bins) / total[..., None]
        centred = parts - parts.mean(axis=0)
        covariance = np.einsum("n...i,n...j->...ij", centred, centred) * (cases / (cases - 1))
        trace = np.trace(covariance, axis1=-2, axis2=-1)
        # The squared norm of an estimated covariance is too large by this much.
        square = ((covariance**2).sum(axis=(-2, -1)) - trace**2 / (cases - 1)) / (1 + 1 / (cases - 1))
        freedom = np.clip(trace**2 / np.maximum(square, trace**2 / (bins - 1)), 1, bins - 1)
        statistic = freedom * ((share - 1 / bins) ** 2).sum(axis=-1) / trace
    p: np.ndarray = chdtrc(freedom, statistic)
    return p
