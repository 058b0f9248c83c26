"""Cheaper samplers: one evaluation of the denoiser a step.

Ref: EDM (arXiv 2206.00364) Alg. 1; DPM-Solver++ (arXiv 2211.01095) Alg. 2.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from edm2.diffusion.guidance import DenoiserFn, guided_by_level
from edm2.diffusion.sampling import sample_heun, time_steps


@torch.no_grad()
def sample_euler(
    denoiser: DenoiserFn,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    guide: DenoiserFn | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    num_steps: int = 64,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate the probability-flow ODE with Euler's first-order method (DDIM); arguments as in `sample_heun`.

    Uses `num_steps` evaluations of the denoiser.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Raises:
        ValueError: for a guidance weight without a guide, an interval outside the schedule, or a bad schedule.

    Ref: EDM Alg. 1 without its corrector.
    """
    levels: list[float] = time_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    at_level = guided_by_level(denoiser, guide, guidance, interval, levels[:-1])
    x = noise.to(dtype) * levels[0]
    for level, next_level, sigma in _pairs(levels, x):
        denoised = at_level(level)(x, sigma, labels).to(dtype)
        x = denoised + next_level / level * (x - denoised)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    denoiser: DenoiserFn,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    guide: DenoiserFn | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integrate with DPM-Solver++ 2M, a second-order multistep method; arguments as in `sample_heun`.

    Uses `num_steps` evaluations of the denoiser: half of Heun's at the same order. Time is
    `lambda = -ln sigma`, in which the linear part of the ODE is solved exactly and the denoiser's output is
    taken as linear, from this step's and the last step's values. The first step has no last one, and the step
    to sigma = 0 is endless in lambda; both take it as constant.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Raises:
        ValueError: for a guidance weight without a guide, an interval outside the schedule, or a bad schedule.

    Ref: arXiv 2211.01095 Alg. 2, with alpha = 1 as in EDM.
    """
    levels: list[float] = time_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    at_level = guided_by_level(denoiser, guide, guidance, interval, levels[:-1])
    x = noise.to(dtype) * levels[0]
    last: tuple[Tensor, float] | None = None  # denoised images, and the length of the step that left them
    for level, next_level, sigma in _pairs(levels, x):
        denoised = at_level(level)(x, sigma, labels).to(dtype)
        target = denoised
        length = math.log(level / next_level) if next_level else math.inf
        if last is not None and next_level:
            target = denoised + length / (2 * last[1]) * (denoised - last[0])
        ratio = next_level / level
        x = ratio * x + (1 - ratio) * target
        last = denoised, length
    return x


# What `edm2 sample --sampler` calls them.
SamplerName = Literal["heun", "euler", "dpmpp-2m"]
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "heun": sample_heun,
    "euler": sample_euler,
    "dpmpp-2m": sample_dpmpp_2m,
}


def find_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of a name in `SAMPLERS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _pairs(levels: list[float], x: Tensor) -> Iterator[tuple[float, float, Tensor]]:
    """Each level with the next one, and as a tensor for the denoiser."""
    sigmas = torch.tensor(levels, dtype=torch.float64).to(x.device, x.dtype)
    return zip(levels[:-1], levels[1:], sigmas, strict=False)
