"""How a run's weights moved, estimated from the distances between its stored averages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edm2.ema.maths.motion import TYPICAL, Grid, Kind, Motion
from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.targets import Profile

_SLOWINGS = (0.0, 1.0, 2.0, 4.0)
KINDS = tuple(Kind(order=order, slowing=slowing) for order in (0, 1, 2) for slowing in _SLOWINGS)
_PRIOR = np.array([0.05 if kind.order == 0 else 1.0 for kind in KINDS] + [0.1])
_FAINT = 0.05
_TYPICAL_DISTANCE = 0.05  # of weights from their averages under TYPICAL motion


@dataclass(frozen=True)
class _Instant:
    """The weights of one moment, seen as an average."""

    t: float

    def cumulative(self, tau: FloatArray) -> FloatArray:
        return np.where(tau >= self.t, 1.0, 0.0)

    def integral(self, tau: FloatArray) -> FloatArray:
        return np.maximum(tau - self.t, 0.0)


def fit_motion(
    grid: Grid,
    profiles: Sequence[Profile],
    squares: FloatArray,
    rounding: FloatArray,
    weight_squares: FloatArray,
) -> Motion:
    """Find the motion that explains the distances between stored averages.

    A faint prior spreads the motion over all kinds, so that a few distances never put all of it into one kind:
    coefficients that suit every kind a little are safe where the estimate is poor. Motion below the stored rounding
    is invisible, so that much typical motion is assumed.

    Args:
        grid: Times that resolve the profiles.
        profiles: Profile of each stored average [n].
        squares: Squared distances between them, relative to the squared norm [n, n].
        rounding: Relative L2 error of each as stored [n].
        weight_squares: Squared distance of each average to the weights of its time; NaN where unknown [n].

    Returns:
        The motion: a power for each of `KINDS`.
    """
    first, second = np.triu_indices(len(profiles), 1)
    rows = [grid.rows(p, KINDS) for p in profiles]
    pairs = [_pair_squares(np.stack([r[k] for r in rows]), first, second) for k in range(len(KINDS))]
    known = [i for i, square in enumerate(weight_squares.tolist()) if math.isfinite(square)]
    to_weights = [_weight_row(grid, profiles[i], rows[i]) for i in known]
    model = np.concatenate(
        [
            np.column_stack([*pairs, np.zeros(first.size)]),
            np.array(to_weights).reshape(len(known), len(KINDS) + 1),
        ]
    )
    noise = np.append(rounding[first] ** 2 + rounding[second] ** 2, rounding[known] ** 2)
    seen = np.maximum(np.append(squares[first, second], weight_squares[known]) - noise, 0.0)
    size = seen + noise + 1e-30
    trust = 1 / (size + 1e-3 * seen.max(initial=0.0)) / np.sqrt(max(seen.size, 1))
    typical = (model / size[:, None]).sum(axis=0) / np.maximum((model > 0).sum(axis=0), 1)
    a = np.concatenate([model * trust[:, None], _FAINT * np.diag(typical)])
    b = np.concatenate([seen * trust, _FAINT * _PRIOR / _PRIOR.sum()])
    powers = nonnegative_least_squares(a, b)
    error = np.linalg.norm((model @ powers - seen) * trust)
    unseen = float(rounding.max() / _TYPICAL_DISTANCE) ** 2
    found = {
        kind: power + unseen * TYPICAL.powers.get(kind, 0.0)
        for kind, power in zip(KINDS, powers[:-1].tolist(), strict=True)
    }
    return Motion(powers=found, misfit=float(error))


def _pair_squares(rows: FloatArray, first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]) -> FloatArray:
    gram = rows @ rows.T
    square = np.diag(gram)
    return np.asarray(np.maximum((square[:, None] + square - 2 * gram)[first, second], 0.0))


def _weight_row(grid: Grid, profile: Profile, rows: list[FloatArray]) -> list[float]:
    """Squared distance of an average to the weights at its end, one per kind, and the jitter of the weights."""
    instant = _Instant(profile.t)
    out = []
    for kind, row in zip(KINDS, rows, strict=True):
        if kind.order:
            row = row - grid.row(instant, kind)
        out.append(float(row @ row))
    return [*out, 1.0]


def nonnegative_least_squares(a: FloatArray, b: FloatArray) -> FloatArray:
    """Minimise |a x - b| over x >= 0 (active set, after Lawson and Hanson).

    Args:
        a: Matrix [m, n].
        b: Vector [m].

    Returns:
        x [n].
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    free = np.zeros(a.shape[1], dtype=bool)
    x = np.zeros(a.shape[1])
    for _ in range(3 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        gradient[free] = -np.inf
        if gradient.max(initial=-np.inf) <= 1e-10 * np.linalg.norm(b):
            break
        free[np.argmax(gradient)] = True
        x = _step_inside(a, b, x, free)
    return np.asarray(x / scale)


def _step_inside(a: FloatArray, b: FloatArray, x: FloatArray, free: npt.NDArray[np.bool_]) -> FloatArray:
    """Solve for the free variables; fix those that would become negative at 0, one after the other."""
    while True:
        trial = np.zeros_like(x)
        trial[free] = np.linalg.lstsq(a[:, free], b, rcond=1e-12)[0]
        bad = free & (trial <= 0)
        if not bad.any():
            return trial
        step = np.min(x[bad] / np.maximum(x[bad] - trial[bad], 1e-300))
        x = x + step * (trial - x)
        free &= x > 1e-14
        x[~free] = 0.0
