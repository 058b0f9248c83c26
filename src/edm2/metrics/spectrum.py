"""Power of fields by wave number: whether members have as much fine structure as the truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RadialSpectrum:
    """Mean power by wave number.

    Attributes:
        wave: `[K]` waves across the shorter side, 1 to half its pixels; shorter waves in the corners are left out.
        members: `[leads, channels, K]` power of members, which sums over waves to about their variance.
        mean: The same of the ensemble's mean, which loses what the members do not agree on.
        truth: The same of the truth.
    """

    wave: np.ndarray
    members: np.ndarray
    mean: np.ndarray
    truth: np.ndarray

    @classmethod
    def mean_of(cls, spectra: Sequence["RadialSpectrum"]) -> "RadialSpectrum":
        """Mean over cases."""
        names = ("members", "mean", "truth")
        means = {name: np.mean([getattr(s, name) for s in spectra], axis=0) for name in names}
        return cls(wave=spectra[0].wave, **means)


def radial_power(members: np.ndarray, truth: np.ndarray) -> RadialSpectrum:
    """Power by wave number of one case.

    Args:
        members: `[M, leads, channels, H, W]`.
        truth: `[leads, channels, H, W]`.

    Returns:
        The spectrum; for fields that do not repeat at their borders, the jump there adds power to short waves.
    """
    height, width = truth.shape[-2:]
    side = min(height, width)
    down, right = np.fft.fftfreq(height) * side, np.fft.fftfreq(width) * side
    ring = np.rint(np.hypot(down[:, None], right[None, :])).astype(int)
    waves = np.arange(1, side // 2 + 1)
    rings = (ring.reshape(-1)[:, None] == waves).astype(np.float64)

    def power(fields: np.ndarray) -> np.ndarray:
        squared = np.abs(np.fft.fft2(fields)) ** 2 / (height * width) ** 2
        summed: np.ndarray = squared.reshape(*squared.shape[:-2], -1) @ rings
        return summed

    return RadialSpectrum(waves, power(members).mean(axis=0), power(members.mean(axis=0)), power(truth))
