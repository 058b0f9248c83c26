"""How weights move during training: models by which errors of averages are judged.

If the weights move like white noise around a mean, the error of a combination of averages is the L2 norm of its
profile's misfit. If they move like a random walk, it is the norm of the misfit's running integral; if they drift
smoothly, that of the double integral. Each is a least-squares problem on a grid of times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

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
