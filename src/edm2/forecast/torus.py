"""A weather of one's own: fields that drift and diffuse on a torus, whose conditional law is known exactly.

The field u drifts, diffuses and is damped; a random forcing f drives it, which drifts along and fades over several
steps. In Fourier space each wave is a pair of complex numbers,

    f' = phi f + eps,    u' = alpha u + f',

with phi and alpha turned by the drift. The forcing is not observed, but two frames give it, f = u - alpha u_before: so
the law of all later frames given two is Gaussian, with mean and variance in closed form.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edm2.extras import need
from edm2.nn import keyed_normal

# Streams of keyed random numbers: two for the first frames, then one for each step.
_START, _STEPS = 0, 2


@dataclass(frozen=True, kw_only=True)
class Torus:
    """Parameters of the process; the defaults have an error of one step of about 0.4 of the field's deviation.

    Attributes:
        side: Height and width of the fields in pixels, an even number.
        drift: Pixels per step, down and to the right.
        damping: Share of every wave that is lost in a step (as a rate).
        diffusion: Further rate of damping, times the squared wave number in radians per pixel.
        memory: Share of the forcing that is left after a step, in [0, 1).
        length: Length in pixels below which the forcing has no structure.

    Example:
        >>> torus = Torus()
        >>> frames = torus.frames(torch.arange(8), 3, seed=0)  # [8, 3, 16, 16]
        >>> mean, std = torus.law(frames[:, :2], steps=1)
    """

    side: int = 16
    drift: tuple[float, float] = (0.8, -1.3)
    damping: float = 0.15
    diffusion: float = 0.1
    memory: float = 0.4
    length: float = 2.5

    def frames(self, index: Tensor, count: int, *, seed: int) -> Tensor:
        """Draw films of the process in its stationary state, of which each pixel has mean 0 and variance 1.

        Args:
            index: `[N]` int64, one number for each film.
            count: Frames, at least 2.
            seed: A film is a function of (seed, index).

        Returns:
            `[N, count, side, side]` float32.
        """
        waves = self._waves()
        forcing, cross, field = (moment * waves.power for moment in self._moments())
        f_white, u_white = (self._white(index, seed, _START + i) for i in (0, 1))
        # The Cholesky factor of each wave's covariance, which is real: the drift turns both alike.
        f = forcing.sqrt() * f_white
        slope = _safe_ratio(cross, forcing.sqrt())
        u = slope * f_white + (field - slope**2).clamp(min=0).sqrt() * u_white
        before = (u - f) / waves.alpha
        first = torch.fft.ifft2(torch.stack([before, u], dim=1)).real.float()
        later = self.members(first, index, count - 2, seed=seed)
        return torch.cat([first, later], dim=1)

    def members(self, frames: Tensor, index: Tensor, steps: int, *, seed: int) -> Tensor:
        """Draw what follows two frames, from the exact law.

        Args:
            frames: `[N, 2, side, side]`, the earlier frame first.
            index: `[N]` int64, one number for each member.
            steps: Frames to draw.
            seed: A member's noise is a function of (seed, index).

        Returns:
            `[N, steps, side, side]` float32.
        """
        waves = self._waves()
        f, u = self._state(frames)
        found = []
        for step in range(steps):
            f = waves.phi * f + waves.power.sqrt() * self._white(index, seed, _STEPS + step)
            u = waves.alpha * u + f
            found.append(torch.fft.ifft2(u).real.float())
        return torch.stack(found, dim=1) if found else frames[:, :0]

    def law(self, frames: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The law of each later pixel, which is Gaussian.

        Args:
            frames: `[N, 2, side, side]`, the earlier frame first.
            steps: Frames ahead.

        Returns:
            Means `[N, steps, side, side]`, and the standard deviation of every pixel at each step, `[steps]`.
        """
        waves = self._waves()
        f, u = self._state(frames)
        means, variances = [], []
        # What a unit of noise has become after n steps, in the field and in the forcing.
        in_field, in_forcing = torch.zeros_like(waves.alpha), torch.ones_like(waves.alpha)
        variance = torch.zeros(())
        for _ in range(steps):
            f = waves.phi * f
            u = waves.alpha * u + f
            means.append(torch.fft.ifft2(u).real.float())
            in_field = waves.alpha * in_field + in_forcing
            in_forcing = waves.phi * in_forcing
            variance = variance + (in_field.abs().square() * waves.power).mean()
            variances.append(variance)
        return torch.stack(means, dim=1), torch.stack(variances).sqrt().float()

    def law_score(self, frames: Tensor, truth: Tensor) -> np.ndarray:
        """CRPS of the exact law, the lowest on average that any forecast has.

        Args:
            frames: `[N, 2, side, side]`, the earlier frame first.
            truth: `[N, steps, side, side]` what followed.

        Returns:
            `[steps]`, the mean over cases and pixels.
        """
        rules = need("scoringrules", "the score of the exact law")
        mean, std = (x.double().numpy() for x in self.law(frames, truth.shape[1]))
        score: np.ndarray = rules.crps_normal(
            truth.double().numpy(), mean, std[:, None, None], backend="numpy"
        )
        means: np.ndarray = score.mean(axis=(0, 2, 3))
        return means

    def denoise(self, x: Tensor, sigma: float, frames: Tensor) -> Tensor:
        """The exact denoiser of the next frame: what a network that is conditioned on two frames should learn.

        Args:
            x: `[N, 1, side, side]` next frames with noise.
            sigma: Standard deviation of the noise, in units in which the field has 1.
            frames: `[N, 2, side, side]`, the earlier frame first.

        Returns:
            The expected next frames, `[N, 1, side, side]` float32.
        """
        mean, _ = self.law(frames, 1)
        power = self._waves().power
        waves = torch.fft.fft2(x.double() - mean) * (power / (power + sigma**2))
        expected: Tensor = mean + torch.fft.ifft2(waves).real.float()
        return expected

    def _state(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        before, now = torch.fft.fft2(frames.double()).unbind(1)
        return now - self._waves().alpha * before, now

    def _white(self, index: Tensor, seed: int, stream: int) -> Tensor:
        noise = keyed_normal(index, (self.side, self.side), seed=seed, stream=stream)
        waves: Tensor = torch.fft.fft2(noise.double())
        return waves

    def _waves(self) -> "_Waves":
        k = 2 * math.pi * torch.fft.fftfreq(self.side, dtype=torch.float64)
        down, right = k[:, None], k[None, :]
        squared = down**2 + right**2
        turn = torch.exp(-1j * (down * self.drift[0] + right * self.drift[1]))
        rate = torch.exp(-self.damping - self.diffusion * squared)
        power = torch.exp(-squared * self.length**2 / 2)
        # The highest wave has no direction, so that nothing could drift in it.
        power = power * (down > k.min()) * (right > k.min())
        # So that a pixel of the field has variance 1.
        unit = (_stationary(rate, self.memory)[2] * power).mean()
        return _Waves(alpha=rate * turn, phi=self.memory * turn, power=power / unit)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return _stationary(self._waves().alpha.abs(), self.memory)


@dataclass(frozen=True)
class _Waves:
    """What a step does to each wave, `[side, side]` each: factors of field and forcing, and power of the noise."""

    alpha: Tensor
    phi: Tensor
    power: Tensor


def _stationary(rate: Tensor, memory: float) -> tuple[Tensor, Tensor, Tensor]:
    """Variance of the forcing, covariance of both, and variance of the field, for noise of unit variance."""
    forcing = torch.full_like(rate, 1 / (1 - memory**2))
    cross = forcing / (1 - rate * memory)
    field = (forcing + 2 * rate * memory * cross) / (1 - rate**2)
    return forcing, cross, field


def _safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp(min=1e-300), torch.zeros_like(a))
