"""Coefficients that combine stored averages into a wanted one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edm2.ema.maths.motion import TYPICAL, WHITE, Grid, Motion
from edm2.ema.maths.profiles import FloatArray, power_inner, sigma_rel_to_gamma
from edm2.ema.maths.targets import PowerProfile, Profile

HOPELESS_MISFIT = 0.75
"""Largest misfit of a combination, relative to the norm of the wanted profile; above it, it is refused."""


def solve_coefficients(
    times: npt.ArrayLike, sigma_rels: npt.ArrayLike, target_time: float, target_sigma_rels: npt.ArrayLike
) -> FloatArray:
    """Plain solve: the combination of snapshots nearest in L2 to each target's profile.

    Args:
        times: Time of each snapshot, > 0 [in].
        sigma_rels: EMA length of each snapshot's profile [in].
        target_time: Time of the target; later snapshots are not used.
        target_sigma_rels: Wanted EMA lengths [out].

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
            f"no snapshot is in (0, {target_time:g}], the time of the target; times given: {t.tolist()}"
        )
    gammas, target_gammas = sigma_rel_to_gamma(widths[used]), sigma_rel_to_gamma(targets)
    ts, gs = t[used, None], gammas[:, None]
    a = power_inner(ts, gs, ts.T, gs.T)
    b = power_inner(ts, gs, target_time, target_gammas[None, :])
    x = np.linalg.solve(a, b)
    coefficients = np.zeros((t.size, targets.size))
    coefficients[used] = x / x.sum(axis=0)
    return coefficients


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A combination of stored averages, and its errors.

    Attributes:
        coefficients: Weight of each average; they sum to 1 [in].
        moved: Relative L2 error of the parameters from the profile's misfit, if weights move as assumed.
        rounding: Relative L2 error from the averages' own rounding. If weights hardly move, all averages are rounded
            alike and their errors do not cancel; the value covers that case.
        profile_misfit: L2 distance to the wanted profile, relative to its norm.
    """

    coefficients: FloatArray
    moved: float
    rounding: float
    profile_misfit: float

    @property
    def amplification(self) -> float:
        """Root of the sum of squared coefficients: the factor by which rounding grows."""
        return float(np.linalg.norm(self.coefficients))


def solve_motion(
    grid: Grid, profiles: Sequence[Profile], rounding: FloatArray, targets: Sequence[Profile], motion: Motion
) -> list[Solution]:
    """Find the combinations with the least expected error: misfit under the motion plus amplified rounding.

    It solves least squares by QR factorisation, which stays exact with hundreds of averages.

    Args:
        grid: Times that resolve all profiles.
        profiles: Profile of each stored average [in].
        rounding: Relative L2 error of each as stored [in].
        targets: Wanted profiles [out].
        motion: How the weights moved.

    Returns:
        One solution per target.
    """
    num_in = len(profiles)
    moving = np.stack([grid.column(p, motion) for p in profiles], axis=1)
    wanted = np.stack([grid.column(p, motion) for p in targets], axis=1)
    white = np.stack([grid.column(p, WHITE) for p in profiles], axis=1)
    reference = max(range(num_in), key=lambda i: profiles[i].t)
    noise = np.diag(rounding)
    columns = np.concatenate([moving, noise])
    others = np.delete(columns - columns[:, [reference]], reference, axis=1)
    rhs = np.concatenate([wanted, np.zeros((num_in, len(targets)))]) - columns[:, [reference]]
    triangle = np.asarray(np.linalg.qr(np.concatenate([others, rhs], axis=1), mode="r"))
    z = np.linalg.lstsq(triangle[:, : num_in - 1], triangle[:, num_in - 1 :], rcond=1e-15)[0]
    solutions = []
    for j, target in enumerate(targets):
        x = np.insert(z[:, j], reference, 1 - z[:, j].sum())
        exact = [i for i, p in enumerate(profiles) if _same(p, target)]
        if exact:
            x = np.eye(num_in)[exact[0]]
        aim = grid.column(target, WHITE)
        solutions.append(
            Solution(
                coefficients=x,
                moved=float(np.linalg.norm(moving @ x - wanted[:, j])),
                rounding=max(float(np.linalg.norm(rounding * x)), abs(float(rounding @ x))),
                profile_misfit=float(np.linalg.norm(white @ x - aim) / np.linalg.norm(aim)),
            )
        )
    return solutions


def solve_live(sigma_rels: Sequence[float], sigma_rel: float) -> FloatArray:
    """Combine averages of one time, in float32, into one of another length, without knowing how the weights move.

    Args:
        sigma_rels: Tracked EMA lengths [in].
        sigma_rel: Wanted EMA length.

    Returns:
        Coefficients [in].

    Raises:
        ValueError: If every combination is far from it.
    """
    profiles = [PowerProfile(1.0, sigma_rel_to_gamma(s)) for s in sigma_rels]
    target = PowerProfile(1.0, sigma_rel_to_gamma(sigma_rel))
    rounding = np.full(len(profiles), 1e-6)
    (solution,) = solve_motion(Grid([*profiles, target]), profiles, rounding, [target], TYPICAL)
    if solution.profile_misfit > HOPELESS_MISFIT:
        raise ValueError(
            f"sigma_rel {sigma_rel:g} cannot be made from the tracked ones, {tuple(sigma_rels)} (misfit"
            f" {solution.profile_misfit:.0%}): choose one nearer to them, or track another"
        )
    return solution.coefficients


def _same(stored: Profile, target: Profile) -> bool:
    return (
        isinstance(stored, PowerProfile)
        and isinstance(target, PowerProfile)
        and stored.t == target.t
        and abs(stored.gamma - target.gamma) <= 1e-9 * (1 + stored.gamma)
    )
