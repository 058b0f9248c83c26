"""Averaging profiles in training time: how much weight an average gives to the weights of each moment."""

from typing import overload

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

MAX_SIGMA_REL = 12.0**-0.5


@overload
def sigma_rel_to_gamma(sigma_rel: float) -> float: ...
@overload
def sigma_rel_to_gamma(sigma_rel: npt.ArrayLike) -> FloatArray: ...
def sigma_rel_to_gamma(sigma_rel: npt.ArrayLike) -> float | FloatArray:
    """Exponent of the power profile with a given EMA length.

    Args:
        sigma_rel: Standard deviation of the profile as a fraction of training time, in (0, 0.2887].

    Returns:
        gamma >= 0, a float for a float and an array for an array.

    Raises:
        ValueError: If a length is outside that range.

    Ref: EDM2 Sec. 3.1, App. C.2.
    """
    widths = np.asarray(sigma_rel, dtype=np.float64)
    bad = widths[~((widths > 0) & (widths <= MAX_SIGMA_REL * (1 + 1e-12)))]
    if bad.size:
        raise ValueError(
            f"sigma_rel {bad.flat[0]:g} is outside (0, {MAX_SIGMA_REL:.4f}]: no power profile is longer"
            " than the plain mean over all of training; try a value between 0.01 and 0.25"
        )
    gammas = np.array([_largest_root(width) for width in widths.ravel()]).reshape(widths.shape)
    return gammas if gammas.ndim else float(gammas)


def _largest_root(sigma_rel: float) -> float:
    k = sigma_rel**-2
    root = float(np.roots([1.0, 7.0, 16.0 - k, 12.0 - k]).real.max())
    for _ in range(2):  # eigenvalues of the companion matrix lose digits when k is large
        value = ((root + 7.0) * root + (16.0 - k)) * root + (12.0 - k)
        root -= value / ((3.0 * root + 14.0) * root + (16.0 - k))
    return max(root, 0.0)


@overload
def gamma_to_sigma_rel(gamma: float) -> float: ...
@overload
def gamma_to_sigma_rel(gamma: npt.ArrayLike) -> FloatArray: ...
def gamma_to_sigma_rel(gamma: npt.ArrayLike) -> float | FloatArray:
    """EMA length of the power profile with a given exponent.

    Args:
        gamma: Exponent, at least 0.

    Returns:
        sigma_rel in (0, 0.2887], a float for a float and an array for an array.

    Raises:
        ValueError: If an exponent is negative.

    Ref: EDM2 Sec. 3.1, App. C.2.
    """
    g = np.asarray(gamma, dtype=np.float64)
    if not np.all(g >= 0):
        raise ValueError(f"gamma must be at least 0 (the plain mean), got {g[~(g >= 0)].flat[0]:g}")
    widths = np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))
    return widths if widths.ndim else float(widths)


def decay(t: float, dt: float, gamma: float) -> float:
    """Share of the old average that an update at time t keeps.

    Args:
        t: Training time of the update, any unit that starts at 0.
        dt: Time since the previous update, in (0, t].
        gamma: Exponent of the profile.

    Returns:
        beta in [0, 1): the average becomes `beta * average + (1 - beta) * weights`.

    Raises:
        ValueError: If dt is not in (0, t].

    Ref: EDM2 Sec. 3.1.
    """
    return 1.0 - step_weight(t, dt, gamma)


def step_weight(t: float, dt: float, gamma: float) -> float:
    """`1 - decay(t, dt, gamma)`, exact also where the decay rounds to 1 (long trainings)."""
    if not 0 < dt <= t:
        raise ValueError(f"dt must be in (0, t], got dt {dt:g} at t {t:g}: time starts at 0 and only grows")
    return 1.0 if dt == t else float(-np.expm1((gamma + 1) * np.log1p(-dt / t)))


def power_inner(
    t_a: npt.ArrayLike, gamma_a: npt.ArrayLike, t_b: npt.ArrayLike, gamma_b: npt.ArrayLike
) -> FloatArray:
    """L2 inner products of power profiles, broadcast like the arguments.

    Args:
        t_a: End times of the first profiles, > 0.
        gamma_a: Their exponents.
        t_b: End times of the second profiles, > 0.
        gamma_b: Their exponents.

    Returns:
        The integral over time of the product of the two densities, per pair.

    Ref: EDM2 Sec. 3.2, App. C.
    """
    ta, ga, tb, gb = (np.asarray(v, dtype=np.float64) for v in (t_a, gamma_a, t_b, gamma_b))
    exponent = np.where(ta < tb, gb, -ga)
    return np.asarray((ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb)))


def power_density(tau: npt.ArrayLike, t: float, gamma: float) -> FloatArray:
    """Density of the power profile that ends at t, at times tau (0 outside [0, t])."""
    x = np.asarray(tau, dtype=np.float64) / t
    return np.where((x >= 0) & (x <= 1), (gamma + 1) / t * np.clip(x, 0, 1) ** gamma, 0.0)


def power_cumulative(tau: npt.ArrayLike, t: float, gamma: float) -> FloatArray:
    """Mass that the power profile ending at t gives to times up to tau."""
    return np.asarray(np.clip(np.asarray(tau, dtype=np.float64) / t, 0, 1) ** (gamma + 1))
