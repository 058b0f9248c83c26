"""Which times of a folder to delete, so that the remaining ones still give a range of widths."""

from collections.abc import Sequence

import numpy as np

from edm2.ema.maths.plans import best_errors, spread

_RANGE = (0.03, 0.25)
_MOST_TRIED = 12


def times_to_keep(
    times: Sequence[float], sigma_rels: Sequence[float], count: int, *, dtype: str = "fp32"
) -> list[float]:
    """Drop times one by one, each time the one whose loss adds the least error, never the last.

    The error is the worst over sigma_rel 0.03 to 0.25, now and while the last time grows by half of its `count`-th
    part. Looking at the present alone would keep times for their current value, and soon leave a gap that no choice
    can close.

    Args:
        times: Increasing times since the start of training.
        sigma_rels: Widths stored at each.
        count: Number of times to keep.
        dtype: How they are stored.

    Returns:
        The times kept.
    """
    kept = list(times)
    widths = spread(_RANGE, 25)
    moments = (1 + 0.5 / count) ** np.array([0.0, 0.5, 1.0])

    def error_without(i: int) -> float:
        *before, last = kept[:i] + kept[i + 1 :]
        sets = [np.array([*before, last * moment]) / (last * moment) for moment in moments]
        return max(float(best_errors(x.tolist(), sigma_rels, 1.0, widths, dtype)[0].max()) for x in sets)

    while len(kept) > count:
        around = np.array([0.0, *kept])
        gaps = around[2:] - around[:-2]
        crowded = np.argsort(gaps, kind="stable")[:_MOST_TRIED].tolist()
        kept.pop(min(sorted(crowded), key=error_without))
    return kept
