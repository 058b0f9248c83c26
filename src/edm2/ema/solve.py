"""Coefficients that turn stored averages into a wanted one."""

import numpy as np
import numpy.typing as npt

from edm2.ema.profiles import FloatArray, power_inner, sigma_rel_to_gamma


def solve_coefficients(
    times: npt.ArrayLike,
    sigma_rels: npt.ArrayLike,
    target_time: float,
    target_sigma_rels: npt.ArrayLike,
) -> FloatArray:
    """Plain solve: the combination of snapshots nearest in L2 to each target's profile.

    Args:
        times: Time of each snapshot, > 0 [in].
        sigma_rels: Width of each snapshot's profile [in].
        target_time: Time of the target; later snapshots take no part.
        target_sigma_rels: Wanted widths [out].

    Returns:
        Coefficients, float64 [in, out]; each column sums to 1.

    Raises:
        ValueError: If lengths differ, a pair repeats, or no snapshot lies at or before the target.

    Ref: EDM2 Sec. 3.2, App. C.
    """
    t = np.atleast_1d(np.asarray(times, dtype=np.float64))
    widths = np.atleast_1d(np.asarray(sigma_rels, dtype=np.float64))
    targets = np.atleast_1d(np.asarray(target_sigma_rels, dtype=np.float64))
    if t.shape != widths.shape or t.ndim != 1:
        raise ValueError(
            f"times and sigma_rels must be lists of one length, got {t.shape} and {widths.shape}"
        )
    pairs = list(zip(t.tolist(), widths.tolist(), strict=True))
    repeated = next((p for i, p in enumerate(pairs) if p in pairs[:i]), None)
    if repeated is not None:
        raise ValueError(
            f"snapshot t {repeated[0]:g}, sigma_rel {repeated[1]:g} is given twice: list each once"
        )
    used = np.flatnonzero((t > 0) & (t <= target_time))
    if not used.size:
        raise ValueError(
            f"no snapshot lies in (0, {target_time:g}], the time of the target; times given: {t.tolist()}"
        )
    gammas, target_gammas = sigma_rel_to_gamma(widths[used]), sigma_rel_to_gamma(targets)
    ts, gs = t[used, None], gammas[:, None]
    a = power_inner(ts, gs, ts.T, gs.T)
    b = power_inner(ts, gs, target_time, target_gammas[None, :])
    x = np.linalg.solve(a, b)
    coefficients = np.zeros((t.size, targets.size))
    coefficients[used] = x / x.sum(axis=0)
    return coefficients
