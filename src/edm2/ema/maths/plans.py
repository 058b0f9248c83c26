"""Plans: which averages are tracked, when they are stored, and the expected error."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edm2.ema.maths.profiles import FloatArray, power_inner, sigma_rel_to_gamma
from edm2.ema.storage.encoding import TYPICAL_ROUNDING

WINDOWS_PER_RUN = 1024
"""Windows that make up the training so far; runs of more updates need one (`edm2.ema.tracking.averages`)."""

MOVEMENT = 0.05
"""Relative distance that trained weights typically lie from their averages (2% to 15%: benchmarks/ema_plans.py)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which averages are tracked and when they are stored.

    Errors are in units of the profile: the L2 distance of the reconstructed profile to the wanted one, relative to
    the norm of the wanted one. Rounding of the stored type counts in the same unit: its relative size, amplified by
    the coefficients, divided by `MOVEMENT`, the typical distance of weights from their averages. So an error of 0.01
    is about 0.01 * 0.05 = 5e-4 of the parameters.

    Attributes:
        name: Short name.
        sigma_rels: Tracked EMA lengths.
        times: Times of the snapshots, as fractions of the run; the last one is 1.
        dtype: How they are stored: fp32, bf16 or fp16.
        sigma_range: Shortest and longest EMA length wanted.
    """

    name: str
    sigma_rels: tuple[float, ...]
    times: tuple[float, ...]
    dtype: str = "fp32"
    sigma_range: tuple[float, float] = (0.03, 0.25)

    @property
    def num_files(self) -> int:
        """Number of averages stored."""
        return len(self.sigma_rels) * len(self.times)

    def memory_bytes(self, num_params: int, *, updates: int = 0) -> int:
        """Bytes of the running averages; see `memory_bytes`."""
        return memory_bytes(num_params, len(self.sigma_rels), updates=updates)

    def storage_bytes(self, num_params: int) -> int:
        """Bytes of all snapshots."""
        return num_params * self.num_files * (4 if self.dtype == "fp32" else 2)

    def errors(self, sigma_rels: npt.ArrayLike, *, at: float = 1.0) -> FloatArray:
        """Error at each wanted EMA length, including rounding.

        Args:
            sigma_rels: Wanted EMA lengths [n], in (0, 0.2887].
            at: Time at which they are wanted, as a fraction of the run; at least the first stored time.

        Returns:
            Errors [n].

        Raises:
            ValueError: If nothing is stored up to that time.
        """
        if not self.times[0] <= at <= 1:
            raise ValueError(
                f"at {at:g} is outside [{self.times[0]:g}, 1], the stored part of the run: choose a fraction in it"
            )
        until = next(t for t in self.times if t >= at - 1e-9)
        used = [t for t in self.times if t <= until]
        error, _ = best_errors(used, self.sigma_rels, at, np.atleast_1d(sigma_rels), self.dtype)
        return error

    def worst_error(self, *, at: float = 1.0) -> float:
        """Largest error over `sigma_range`."""
        return float(self.errors(spread(self.sigma_range, 121), at=at).max())


def memory_bytes(num_params: int, num_tracks: int, *, updates: int) -> int:
    """Bytes at the most: averages in float32, their base in bfloat16, and windows.

    One or two averages have a window each; more share one after 1,024 updates.
    """
    windows = num_tracks if num_tracks <= 2 else int(updates > WINDOWS_PER_RUN)
    return num_params * (4 * (num_tracks + windows) + 2)


def spread(sigma_range: tuple[float, float], count: int) -> FloatArray:
    """EMA lengths over a range, both ends included."""
    return np.geomspace(*sigma_range, count)


def best_errors(
    times: Sequence[float], sigma_rels: Sequence[float], at: float, wanted: FloatArray, dtype: str
) -> tuple[FloatArray, FloatArray]:
    """Smallest error of wanted widths, from all tracks at all times.

    Args:
        times: When they are stored.
        sigma_rels: EMA lengths stored at each.
        at: Time of the wanted ones.
        wanted: Wanted EMA lengths [n].
        dtype: Stored type.

    Returns:
        Errors [n] in the unit of `Plan`, and norms of the coefficients [n].
    """
    t = np.repeat(np.asarray(times, dtype=np.float64), len(sigma_rels))[:, None]
    gamma = np.tile(sigma_rel_to_gamma(np.asarray(sigma_rels)), len(times))[:, None]
    aim = sigma_rel_to_gamma(wanted)[None, :]
    size = power_inner(at, aim, at, aim)[0]
    inner = power_inner(t, gamma, at, aim)
    gram = power_inner(t, gamma, t.T, gamma.T)
    values, vectors = np.linalg.eigh(gram)
    rounding = TYPICAL_ROUNDING[dtype] / MOVEMENT
    ridge = values[:, None] + max(rounding**2, 1e-15) * size
    free = vectors @ (vectors.T @ inner / ridge)
    ones = vectors @ (vectors.sum(axis=0)[:, None] / ridge)
    x = free - ones * (free.sum(axis=0) - 1) / ones.sum(axis=0)
    misfit = np.maximum(size - 2 * (x * inner).sum(axis=0) + (x * (gram @ x)).sum(axis=0), 0.0) / size
    norms = np.linalg.norm(x, axis=0)
    return np.sqrt(misfit + (rounding * norms) ** 2), norms


def _even(count: int) -> tuple[float, ...]:
    return tuple((i + 1) / count for i in range(count))


PLANS = {
    plan.name: plan
    for plan in (
        Plan(name="paper", sigma_rels=(0.05, 0.1), times=_even(256)),
        Plan(
            name="compact",
            sigma_rels=(0.0312, 0.0407, 0.0611, 0.094, 0.138, 0.1861, 0.2259, 0.2473),
            times=(1.0,),
        ),
        Plan(name="lean", sigma_rels=(0.0321, 0.0533, 0.2071, 0.2459), times=(0.371, 0.6091, 0.814, 1.0)),
        Plan(name="small", sigma_rels=(0.0321, 0.0494, 0.0876, 0.146, 0.2079, 0.2452), times=(1.0,)),
    )
}
"""The paper's plan; eight and six averages at the last time only; four averages at four times."""


def named_plan(name: str) -> Plan:
    """A plan by its name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PLANS:
        raise ValueError(
            f"plan {name!r} is not known: choose one of {', '.join(PLANS)}, or make one with plan()"
        )
    return PLANS[name]


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
        sigma_rels: EMA lengths stored at each.
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
