"""How weights move during training: models by which errors of averages are judged.

If the weights move like white noise around a mean, the error of a combination of averages is the L2 norm of its
profile's misfit. If they move like a random walk, it is the norm of the misfit's running integral; if they drift
smoothly, that of the double integral. Each is a least-squares problem on a grid of times. How a run's weights moved is
estimated from the distances between its stored averages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.targets import Profile


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way in which weights move.

    Attributes:
        order: 0 white noise, 1 random walk, 2 smooth drift.
        slowing: How the motion slows down: its power falls as `time**-slowing`.
    """

    order: int
    slowing: float


@dataclass(frozen=True, kw_only=True)
class Motion:
    """A model of how weights move: a sum of independent motions.

    Attributes:
        powers: Strength of each kind, for distances relative to the norm of the weights.
        misfit: Relative RMS error of the distances from which it was estimated.
    """

    powers: dict[Kind, float]
    misfit: float


WHITE = Motion(powers={Kind(order=0, slowing=0.0): 1.0}, misfit=0.0)
"""White noise: the plain L2 norm of profiles."""

TYPICAL = Motion(
    powers={
        Kind(order=0, slowing=0.0): 1e-6,
        Kind(order=1, slowing=1.0): 1e-2,
        Kind(order=2, slowing=2.0): 1e-1,
    },
    misfit=0.0,
)
"""Typical training, where no stored average is at hand to estimate the motion from."""


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(6)
_SOFTEN = 0.01


class Integrable(Protocol):
    """What a profile must offer where only its integrals count."""

    def cumulative(self, tau: FloatArray) -> FloatArray:
        """Mass up to times tau."""

    def integral(self, tau: FloatArray) -> FloatArray:
        """Integral of the cumulative mass."""


class Grid:
    """Times and integration weights that resolve some profiles. Time is scaled so that the last profile ends at 1.

    Args:
        profiles: All profiles that will be compared.
    """

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self.end = max(p.t for p in profiles)
        ends = sorted({p.t / self.end for p in profiles} | {b / self.end for p in profiles for b in p.breaks})
        sharpest = max(getattr(p, "gamma", 60.0) for p in profiles)
        edges = np.unique(np.concatenate([[0.0], *map(list, _panels(ends, sharpest))]))
        half = np.diff(edges)[:, None] / 2
        self.times = (edges[:-1, None] + half * (1 + _NODES)).ravel()
        self.weights = (half * _NODE_WEIGHTS).ravel()

    def row(self, profile: Integrable, kind: Kind) -> FloatArray:
        """Vector [nodes] of a profile: squared norms of differences are squared errors if weights move like this."""
        return self._integral(profile, kind.order) * np.sqrt(self.weights * self._power(kind))

    def rows(self, profile: Profile, kinds: Sequence[Kind]) -> list[FloatArray]:
        """`row` for several kinds."""
        integrals = {order: self._integral(profile, order) for order in {kind.order for kind in kinds}}
        return [integrals[kind.order] * np.sqrt(self.weights * self._power(kind)) for kind in kinds]

    def column(self, profile: Profile, motion: Motion) -> FloatArray:
        """Vector of a profile: squared norms of differences are squared errors under this motion."""
        blocks = []
        for order in sorted({kind.order for kind in motion.powers}):
            power = sum(p * self._power(kind) for kind, p in motion.powers.items() if kind.order == order)
            if np.any(power):
                blocks.append(self._integral(profile, order) * np.sqrt(self.weights * power))
        return np.concatenate(blocks) if blocks else np.zeros(1)

    def _power(self, kind: Kind) -> FloatArray:
        return np.asarray(((self.times + _SOFTEN) / (1 + _SOFTEN)) ** -kind.slowing)

    def _integral(self, profile: Integrable, order: int) -> FloatArray:
        tau = self.times * self.end
        if order == 0:
            assert hasattr(profile, "density")
            return np.asarray(profile.density(tau) * self.end)
        return profile.cumulative(tau) if order == 1 else profile.integral(tau) / self.end


def _panels(ends: Sequence[float], sharpest: float) -> list[list[float]]:
    """Edges of panels, finer towards each profile's end, where it is steep."""
    fine = 1 - min(0.5, 3.0 / (sharpest + 1))
    panels = []
    for begin, end in zip([0.0, *ends[:-1]], ends, strict=True):
        edges, position = [end], end
        while position > begin and position > 1e-4 * end:
            position *= fine if position > end * np.exp(-40 / (sharpest + 1)) else 0.5
            if position > begin + 0.3 * (edges[-1] - begin) or begin == 0.0:
                edges.append(max(position, begin))
        panels.append(edges)
    return panels


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
