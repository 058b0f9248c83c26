"""How weights move during training: models by which errors of averages are judged."""

from dataclasses import dataclass


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
