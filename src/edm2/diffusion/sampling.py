"""The schedule and the Heun sampler: functions over any callable `denoiser(x, sigma, labels)`.

Ref: EDM (arXiv 2206.00364) Alg. 2, Eq. 5; EDM2 Sec. 3 and App. C; SPEC section 6.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edm2.diffusion.guidance import DenoiserFn, guided_by_level


def time_steps(
    num_steps: int = 32, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Noise levels of a sampling run: `num_steps` decreasing values, then 0; float64 `[num_steps + 1]`.

    Raises:
        ValueError: for fewer than one step, levels that do not decrease, or rho <= 0.

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


@torch.no_grad()
def sample_heun(
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
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE with Heun's second-order method, optionally with churn.

    Uses `2 num_steps - 1` evaluations of the denoiser; second order in the step size.

    Args:
        denoiser: called as `denoiser(x, sigma, labels)` with sigma a scalar tensor.
        noise: `[B, C, H, W]` unit normal.
        labels: given to the denoiser and the guide as they are.
        guide: see `guided`.
        guidance: see `guided`.
        interval: (low, high]: noise levels at which guidance acts; elsewhere the guide is not run.
        num_steps: number of noise levels.
        sigma_min: lowest noise level before 0.
        sigma_max: highest noise level.
        rho: exponent of the schedule; larger takes shorter steps at low noise.
        s_churn: total strength of the added noise; 0 is deterministic.
        s_min: churn acts on levels from here ...
        s_max: ... to here.
        s_noise: scale of the added noise.
        dtype: precision of the state; the denoiser computes in its own.
        randn_like: draws the churn's noise, called as `randn_like(x)`; needed where s_churn > 0.

    Returns:
        `[B, C, H, W]` in `dtype`.

    Raises:
        ValueError: for a negative churn or one without `randn_like`, a guidance weight without a guide, a bad
            schedule, or an interval that holds none of its levels.

    Ref: EDM Alg. 2.
    """
    levels: list[float] = time_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    steps = torch.tensor(levels, dtype=torch.float64).to(noise.device, dtype)
    if not 0 <= s_churn < math.inf:
        raise ValueError(f"s_churn {s_churn} must be at least 0 and finite; 0 adds no noise")
    if s_churn > 0 and randn_like is None:
        raise ValueError(f"s_churn {s_churn} adds noise: pass randn_like, a function of the state's shape")
    at_level = guided_by_level(denoiser, guide, guidance, interval, levels[:-1])
    churn = [s_churn > 0 and s_min <= level <= s_max for level in levels]
    raise_by = 1 + min(s_churn / num_steps, math.sqrt(2) - 1)

    def slope(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        return (x - at_level(level)(x, sigma, labels).to(dtype)) / sigma

    x = noise.to(dtype) * steps[0]
    for i in range(num_steps):
        sigma, sigma_next, level = steps[i], steps[i + 1], levels[i]
        if churn[i]:
            assert randn_like is not None
            raised = sigma * raise_by
            x = x + (raised**2 - sigma**2).sqrt() * s_noise * randn_like(x).to(dtype)
            sigma, level = raised, level * raise_by
        d = slope(x, sigma, level)
        x_next = x + (sigma_next - sigma) * d
        if i < num_steps - 1:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next, levels[i + 1])) / 2
        x = x_next
    return x
