"""Profiles that can be reconstructed: power functions, exponentials, windows, learning-rate decays, any function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edm2.ema.maths.profiles import (
    FloatArray,
    gamma_to_sigma_rel,
    power_cumulative,
    power_density,
    sigma_rel_to_gamma,
)

_NUM_EDGES = 4097


class Profile(Protocol):
    """An averaging profile on [0, t]: non-negative, of unit mass, zero after t. Time counts from 0."""

    @property
    def t(self) -> float:
        """Time at which it ends."""

    @property
    def breaks(self) -> tuple[float, ...]:
        """Times other than 0 and t at which it is not smooth."""

    def density(self, tau: FloatArray) -> FloatArray:
        """Weight per unit of time at times tau."""

    def cumulative(self, tau: FloatArray) -> FloatArray:
        """Mass up to times tau."""

    def integral(self, tau: FloatArray) -> FloatArray:
        """Integral of the cumulative mass from 0 to tau."""


@dataclass(frozen=True)
class PowerProfile:
    """Weight proportional to `tau**gamma` up to t."""

    t: float
    gamma: float

    @property
    def breaks(self) -> tuple[float, ...]:
        """None."""
        return ()

    def density(self, tau: FloatArray) -> FloatArray:
        """Weight per unit of time."""
        return power_density(tau, self.t, self.gamma)

    def cumulative(self, tau: FloatArray) -> FloatArray:
        """Mass up to tau."""
        return power_cumulative(tau, self.t, self.gamma)

    def integral(self, tau: FloatArray) -> FloatArray:
        """Integral of the cumulative mass."""
        inside = np.minimum(tau, self.t)
        return self.cumulative(inside) * inside / (self.gamma + 2) + np.maximum(tau - self.t, 0.0)


class TableProfile:
    """A profile given by its mass at many times, with constant density between them.

    Args:
        edges: Increasing times, the first >= 0, the last one t.
        mass: Mass up to each of them, from 0 to 1.
        breaks: Times at which the profile is not smooth.
    """

    def __init__(self, edges: FloatArray, mass: FloatArray, *, breaks: tuple[float, ...] = ()) -> None:
        self.t = float(edges[-1])
        self.breaks = breaks
        self._edges, self._mass = edges, mass
        steps = np.diff(edges)
        self._slopes = np.diff(mass) / steps
        self._area = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2 * steps)])

    def density(self, tau: FloatArray) -> FloatArray:
        """Weight per unit of time."""
        index = self._index(tau)
        inside = (tau >= self._edges[0]) & (tau <= self.t)
        return np.where(inside, self._slopes[index], 0.0)

    def cumulative(self, tau: FloatArray) -> FloatArray:
        """Mass up to tau."""
        return np.asarray(np.interp(tau, self._edges, self._mass))

    def integral(self, tau: FloatArray) -> FloatArray:
        """Integral of the cumulative mass."""
        inside = np.clip(tau, self._edges[0], self.t)
        index = self._index(inside)
        step = inside - self._edges[index]
        area = self._area[index] + step * (self._mass[index] + self._slopes[index] * step / 2)
        return area + np.maximum(tau - self.t, 0.0)

    def _index(self, tau: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
        return np.clip(np.searchsorted(self._edges, tau, side="right") - 1, 0, self._slopes.size - 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A wanted average: a kind of profile, whose end is not fixed yet. Make one with the class methods.

    Attributes:
        label: Short description.
        at: Returns the profile that ends at a given time.
        sigma_rel: EMA length, if it is a power function.
    """

    label: str
    at: Callable[[float], Profile]
    sigma_rel: float | None = None

    @classmethod
    def power(cls, sigma_rel: float) -> "Target":
        """Power function by its EMA length, in (0, 0.2887]."""
        gamma = sigma_rel_to_gamma(sigma_rel)
        return cls(label=f"sigma_rel {sigma_rel:g}", at=lambda t: PowerProfile(t, gamma), sigma_rel=sigma_rel)

    @classmethod
    def power_gamma(cls, gamma: float) -> "Target":
        """Power function by its exponent, >= 0."""
        width = gamma_to_sigma_rel(gamma)
        return cls(label=f"gamma {gamma:g}", at=lambda t: PowerProfile(t, gamma), sigma_rel=width)

    @classmethod
    def exponential(cls, half_life: float, *, rampup_ratio: float | None = None) -> "Target":
        """The usual EMA: weights halve every `half_life`, back to the start of training.

        Args:
            half_life: In the clock's unit.
            rampup_ratio: Largest half-life as a fraction of the training time so far, so that the average grows with
                training at first: until time `half_life / rampup_ratio` it is a power function. None: no limit.
        """
        _positive("half_life", half_life)
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(
                f"rampup_ratio {rampup_ratio:g} must be above 0: 0.05 is usual, None for no limit"
            )

        def at(t: float) -> Profile:
            begin = max(0.0, t - 60 * half_life)
            if rampup_ratio is None:
                start = np.exp2(-t / half_life)
                return _table(lambda tau: np.exp2((tau - t) / half_life) - start, begin, t)
            ramp_end, exponent = min(half_life / rampup_ratio, t), np.log(2) / rampup_ratio

            def mass(tau: FloatArray) -> FloatArray:
                ramp = (np.minimum(tau, ramp_end) / ramp_end) ** exponent
                return np.asarray(ramp * np.exp2((np.maximum(tau, ramp_end) - t) / half_life))

            return _table(mass, begin, t)

        ramp = "" if rampup_ratio is None else f", at most {rampup_ratio:g} of the time"
        return cls(label=f"exponential, half-life {half_life:g}{ramp}", at=at)

    @classmethod
    def uniform(cls, window: float) -> "Target":
        """Plain mean over the last `window`, in the clock's unit."""
        return cls._window("uniform", window, lambda u: u)

    @classmethod
    def linear(cls, window: float) -> "Target":
        """Weight that rises linearly from 0 over the last `window`."""
        return cls._window("linear", window, lambda u: u**2)

    @classmethod
    def minus_sqrt(cls, window: float) -> "Target":
        """Like a learning rate that falls as 1 - sqrt over the last `window`: mass sqrt(u) in its first fraction u."""
        return cls._window("minus-sqrt", window, np.sqrt)

    @classmethod
    def custom(cls, density: Callable[[FloatArray], FloatArray], *, label: str = "custom") -> "Target":
        """Any profile.

        Args:
            density: Weight at times from 0 to 1, the target's time; >= 0, any scale.
            label: Short description.
        """
        u = _edges(0.0, 1.0)
        weight = np.asarray(density((u[1:] + u[:-1]) / 2), dtype=np.float64)
        if weight.shape != (u.size - 1,) or not np.all(weight >= 0) or not 0 < weight.sum() < np.inf:
            raise ValueError(
                f"the density of {label!r} must give one finite weight >= 0 for each time, not all 0; got shape"
                f" {weight.shape}, smallest {np.min(weight, initial=np.inf):g}"
            )
        weight = weight * np.diff(u)
        mass = np.concatenate([[0.0], np.cumsum(weight)]) / weight.sum()
        return cls(label=label, at=lambda t: TableProfile(u * t, mass))

    @classmethod
    def _window(cls, kind: str, window: float, mass: Callable[[FloatArray], FloatArray]) -> "Target":
        _positive("window", window)

        def at(t: float) -> Profile:
            if window > t:
                raise ValueError(
                    f"window {window:g} is longer than the training up to {t:g}: choose a shorter one"
                )
            return _table(lambda tau: mass((tau - (t - window)) / window), t - window, t)

        return cls(label=f"{kind}, window {window:g}", at=at)


def _positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise ValueError(f"{name} must be above 0, got {value:g}; it is in the unit of the run's clock")


def _table(mass: Callable[[FloatArray], FloatArray], begin: float, end: float) -> TableProfile:
    edges = _edges(begin, end)
    values = np.maximum(mass(edges), 0.0)
    return TableProfile(edges, values / values[-1], breaks=(begin,) if begin > 0 else ())


def _edges(begin: float, end: float) -> FloatArray:
    """Times that are denser towards both ends."""
    return np.asarray(begin + (end - begin) * np.sin(np.linspace(0, np.pi / 2, _NUM_EDGES)) ** 2)
