"""Samplers: functions of a denoiser, unit noise and a schedule of noise levels.

Each calls `denoiser(x, sigma, labels)` with sigma a scalar tensor on the CPU, so that nothing waits for a GPU.
Guidance and clipping are denoisers of their own, see `edm2.diffusion.guidance`.

Ref: EDM (arXiv 2206.00364) Alg. 1-2, Eq. 5; DPM-Solver++ (arXiv 2211.01095) Alg. 2 and App. D; EDM2 App. C.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edm2.diffusion.guidance import DenoiserFn

# Range of the noise levels at which a consistency model's images are mended; its upper end is relative to the first.
_HIGH_SHARE, _LOW = 0.3, 0.2

Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called at each step with its index, sigma, the noisy images `x` and the denoised ones."""


def time_steps(
    num_steps: int = 32, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The schedule of noise levels: `num_steps` decreasing values, then 0.

    Args:
        num_steps: Number of levels above 0.
        sigma_min: Lowest level above 0.
        sigma_max: Highest level.
        rho: Exponent; a larger one takes shorter steps at low noise.

    Returns:
        `[num_steps + 1]` float64.

    Raises:
        ValueError: If num_steps is below 1, levels do not decrease, or rho is not positive.

    Ref: EDM Eq. 5.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min {sigma_min} and sigma_max {sigma_max}: 0 < sigma_min < sigma_max must hold, both finite"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"rho {rho} must be positive and finite")
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def consistency_steps(
    num_steps: int = 2, levels: Sequence[float] | None = None, sigma_max: float = 80.0
) -> Tensor:
    """The noise levels of `sample_consistency`: the highest, those in between, then 0.

    Args:
        num_steps: Number of levels above 0.
        levels: The `num_steps - 1` levels in between, descending. Default: the middles of equal steps of ln sigma
            from 0.3 times the highest level to 0.2.
        sigma_max: Highest level.

    Returns:
        `[num_steps + 1]` float64.

    Raises:
        ValueError: If num_steps is below 1, or the number of levels is wrong, or they do not descend.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    if levels is None:
        middle = (torch.arange(num_steps - 1, dtype=torch.float64) + 0.5) / max(num_steps - 1, 1)
        high = _HIGH_SHARE * sigma_max
        levels = (high * (_LOW / high) ** middle).tolist()
    if len(levels) != num_steps - 1:
        raise ValueError(
            f"{len(levels)} noise levels {tuple(levels)} for {num_steps} steps: give {num_steps - 1}, for all but "
            "the first step"
        )
    found = torch.tensor([sigma_max, *levels, 0.0], dtype=torch.float64)
    if not (found.isfinite().all() and (found.diff() < 0).all()):
        raise ValueError(f"noise levels {tuple(levels)} must descend from below {sigma_max:g} to above 0")
    return found


@dataclass(frozen=True)
class Churn:
    """Noise that `sample_heun` adds before each step, and then removes with the rest.

    Args:
        s_churn: Total strength; 0 adds none.
        s_min: Lowest noise level at which noise is added.
        s_max: Highest noise level at which noise is added.
        s_noise: Scale of the added noise.
        randn_like: Draws unit noise of the shape of its argument.

    Ref: EDM Alg. 2, Table 5.
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like

    def raise_noise(self, x: Tensor, sigma: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Noisy images and their level, raised by this step's share of the churn."""
        if self.s_churn == 0 or not (self.s_min <= sigma and sigma <= self.s_max):
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / num_steps, math.sqrt(2) - 1))
        added = (raised**2 - sigma**2).sqrt() * self.s_noise * self.randn_like(x).to(x.dtype)
        return x + added, raised


@torch.no_grad()
def sample_heun(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    churn: Churn | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate the probability-flow ODE with Heun's second-order method.

    Uses `2 num_steps - 1` evaluations of the denoiser.

    Args:
        denoiser: Called as `denoiser(x, sigma, labels)`.
        noise: `[B, C, H, W]` unit normal.
        sigmas: Schedule that ends in 0, such as `time_steps()`.
        labels: Passed to the denoiser.
        churn: Noise to add on the way; None for a deterministic sampler.
        callback: Called at each step with (step index, sigma, x, denoised).
        dtype: Precision of the images between steps; the denoiser computes in its own.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: EDM Alg. 2.
    """
    steps = sigmas.to("cpu", dtype)
    num_steps = len(steps) - 1
    x = noise.to(dtype) * steps[0]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(steps)):
        if churn is not None:
            x, sigma = churn.raise_noise(x, sigma, num_steps)
        denoised = denoiser(x, sigma, labels).to(dtype)
        if callback is not None:
            callback(i, sigma, x, denoised)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if i < num_steps - 1:
            slope_next = (x_next - denoiser(x_next, sigma_next, labels).to(dtype)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_euler(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate the probability-flow ODE with Euler's first-order method (DDIM); arguments as in `sample_heun`.

    Uses `num_steps` evaluations of the denoiser.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: EDM Alg. 1 without its corrector.
    """
    x = noise.to(dtype) * float(sigmas[0])
    for i, sigma, level, next_level in _steps(sigmas, dtype):
        denoised = denoiser(x, sigma, labels).to(dtype)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = denoised + next_level / level * (x - denoised)
    return x


def sample_dpmpp_2m(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate with DPM-Solver++ 2M, a second-order multistep method; arguments as in `sample_heun`.

    Uses `num_steps` evaluations of the denoiser: half of Heun's at the same order. It is `sample_dpmpp_2m_sde`
    without noise.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: arXiv 2211.01095 Alg. 2, with alpha = 1 as in EDM.
    """
    return sample_dpmpp_2m_sde(denoiser, noise, sigmas, labels, eta=0.0, callback=callback, dtype=dtype)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate the reverse-time SDE with DPM-Solver++ 2M; other arguments as in `sample_heun`.

    Time is `lambda = -ln sigma`, in which the linear part is solved exactly and the denoised images are taken as
    linear, from this step's and the last step's. The first step has no last one, and the step to sigma = 0 is
    infinite in lambda; both take them as constant. Uses `num_steps` evaluations of the denoiser.

    Args:
        denoiser: See `sample_heun`.
        noise: See `sample_heun`.
        sigmas: See `sample_heun`.
        labels: See `sample_heun`.
        eta: Share of the noise that is replaced: 1 solves the SDE, 0 the ODE.
        s_noise: Scale of the added noise.
        randn_like: Draws unit noise of the shape of its argument.
        callback: See `sample_heun`.
        dtype: See `sample_heun`.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: arXiv 2211.01095 App. D (SDE-DPM-Solver++ 2M), with alpha = 1 as in EDM.
    """
    x = noise.to(dtype) * float(sigmas[0])
    last: tuple[Tensor, float] | None = None  # denoised images, and length of the step that followed them
    for i, sigma, level, next_level in _steps(sigmas, dtype):
        denoised = target = denoiser(x, sigma, labels).to(dtype)
        if callback is not None:
            callback(i, sigma, x, denoised)
        length = math.log(level / next_level) if next_level else math.inf
        if last is not None and next_level:
            target = denoised + length / (2 * last[1]) * (denoised - last[0])
        damping = (next_level / level) ** eta
        ratio = next_level / level * damping
        x = ratio * x + (1 - ratio) * target
        if eta and next_level:
            x = x + next_level * math.sqrt(1 - damping**2) * s_noise * randn_like(x).to(dtype)
        last = denoised, length
    return x


@torch.no_grad()
def sample_dpmpp_3m(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate with a third-order multistep method; arguments as in `sample_heun`.

    In time `lambda = -ln sigma` the denoised images are taken as the parabola through this step's and the last two,
    and the ODE is solved exactly for it: DPM-Solver++ 2M with one more step of memory. The first steps have less
    memory, and the step to sigma = 0 takes the denoised images as they are. Uses `num_steps` evaluations of the
    denoiser.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: arXiv 2211.01095 Eq. 9 (k = 3), with derivatives from past steps and alpha = 1 as in EDM.
    """
    x = noise.to(dtype) * float(sigmas[0])
    last: tuple[Tensor, float] | None = None  # denoised images, and length of the step that followed them
    before: tuple[Tensor, float] | None = None  # slope of the denoised images over a step, and its length
    for i, sigma, level, next_level in _steps(sigmas, dtype):
        denoised = denoiser(x, sigma, labels).to(dtype)
        if callback is not None:
            callback(i, sigma, x, denoised)
        if next_level == 0:
            return denoised
        length = math.log(level / next_level)
        # Integrals of exp(u - length) u^k over u in [0, length].
        constant = -math.expm1(-length)
        linear = length - constant
        square = length**2 - 2 * linear
        x_next = next_level / level * x + constant * denoised
        if last is not None:
            slope = (denoised - last[0]) / last[1]
            x_next = x_next + linear * slope
            if before is not None:
                bend = (slope - before[0]) / (last[1] + before[1])
                x_next = x_next + (square + last[1] * linear) * bend
            before = slope, last[1]
        x, last = x_next, (denoised, length)
    return x


@torch.no_grad()
def sample_consistency(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Map noise to images with a consistency model: denoise fully, add noise of the next level, denoise again.

    Uses one evaluation for each level above 0. Other arguments are as in `sample_heun`.

    Args:
        denoiser: A denoiser that was trained to be consistent, such as the student of `edm2 distill`.
        noise: See `sample_heun`.
        sigmas: Levels that end in 0, such as `consistency_steps(2)`.
        labels: See `sample_heun`.
        randn_like: Draws unit noise of the shape of its argument.
        callback: See `sample_heun`.
        dtype: See `sample_heun`.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Ref: arXiv 2303.01469 Alg. 1, with 0 as the lowest level.
    """
    x = noise.to(dtype) * float(sigmas[0])
    for i, sigma, _, next_level in _steps(sigmas, dtype):
        denoised = denoiser(x, sigma, labels).to(dtype)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = denoised + next_level * randn_like(x).to(dtype) if next_level else denoised
    return x


SamplerName = Literal["heun", "euler", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "consistency"]
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "heun": sample_heun,
    "euler": sample_euler,
    "dpmpp-2m": sample_dpmpp_2m,
    "dpmpp-2m-sde": sample_dpmpp_2m_sde,
    "dpmpp-3m": sample_dpmpp_3m,
    "consistency": sample_consistency,
}


def find_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of a name in `SAMPLERS`.

    Raises:
        ValueError: If there is no sampler of that name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _steps(sigmas: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, float, float]]:
    """Each step's index, level as a tensor for the denoiser, and this and the next level as numbers."""
    levels: list[float] = sigmas.tolist()
    tensors = sigmas.to("cpu", dtype)
    return zip(itertools.count(), tensors, levels[:-1], levels[1:], strict=False)
