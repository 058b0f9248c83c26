"""How images are sampled: sampler, schedule, guidance, added noise and clipping, as one checked set of options."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from edm2.diffusion import Churn, DenoiserFn, clipped, consistency_steps, find_sampler, guided, time_steps
from edm2.diffusion.samplers import Callback

_SDE, _THIRD_ORDER = "dpmpp-2m-sde", "dpmpp-3m"
STUDENT_SAMPLER: Final = "consistency"
_ALWAYS_TOLD = ("num_steps", "sigma_min", "sigma_max", "rho", "guidance")
# Noise levels and exponent of the schedule where they are not given: the published ones, and those with which
# dpmpp-3m comes as close to the exact solution with 24 evaluations as Heun with 63 (docs/results/speed.md).
_PUBLISHED, _STANDARD = (32, 7.0), {_THIRD_ORDER: (24, 10.0)}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Options of `ImageGenerator.images`, `write_samples` and `edm2 sample`.

    Attributes:
        sampler: Name in `edm2.diffusion.SAMPLERS`, or a function called as
            `sampler(denoiser, noise, sigmas, labels)`.
        num_steps: Number of noise levels. Default: 24 for `dpmpp-3m`, 32 for the others.
        sigma_min: Lowest noise level above 0.
        sigma_max: Highest noise level.
        rho: Exponent of the schedule. Default: 10 for `dpmpp-3m`, 7 for the others.
        levels: Noise levels of `consistency` after the first, `num_steps - 1` of them; None chooses them.
        guidance: Guidance weight; 1 for none.
        interval: Noise levels (low, high] at which guidance acts.
        s_churn: Strength of the noise that `heun` adds; 0 is deterministic.
        s_min: Lowest noise level at which `heun` adds noise.
        s_max: Highest noise level at which `heun` adds noise.
        s_noise: Scale of the noise that `heun` and `dpmpp-2m-sde` add.
        clip_denoised: Clamp the denoised images of every step to the range of pixels.

    Raises:
        ValueError: If a value is out of range, or has no effect with the others.
    """

    sampler: str | Callable[..., Tensor] = "dpmpp-3m"
    num_steps: int | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float | None = None
    levels: tuple[float, ...] | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    clip_denoised: bool = False

    def __post_init__(self) -> None:
        steps, rho = _PUBLISHED
        if isinstance(self.sampler, str):
            find_sampler(self.sampler)
            steps, rho = _STANDARD.get(self.sampler, _PUBLISHED)
        object.__setattr__(self, "num_steps", steps if self.num_steps is None else self.num_steps)
        object.__setattr__(self, "rho", rho if self.rho is None else self.rho)
        if self.sampler == _THIRD_ORDER and self.num_steps is not None and 0 < self.num_steps < steps:
            warnings.warn(
                f"{_THIRD_ORDER} with {self.num_steps} noise levels makes worse images than dpmpp-2m: choose that "
                f"sampler, or at least {steps} levels",
                stacklevel=1,
            )
        levels = self.sigmas()[:-1].float()  # as samplers compare them with the interval
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} must be finite")
        low, high = self.interval
        if self.interval != (0.0, math.inf):
            told = f"guidance interval ({low:g}, {high:g}]"
            if self.guidance == 1:
                raise ValueError(f"{told} has no effect with guidance 1: give a weight and a guide")
            if not 0 <= low < high:
                raise ValueError(f"{told} is empty: 0 <= low < high must hold")
            if not ((levels > low) & (levels <= high)).any():
                raise ValueError(
                    f"{told} holds none of the schedule's noise levels, {levels[-1]:g} to {levels[0]:g}: choose one "
                    "that does"
                )
        self._check_noise()

    def _check_noise(self) -> None:
        if self.levels is not None and self.sampler != STUDENT_SAMPLER:
            raise ValueError(
                f"levels {self.levels} are for the sampler consistency, not {self.sampler}: leave them out"
            )
        if not 0 <= self.s_churn < math.inf:
            raise ValueError(f"s_churn {self.s_churn} must be at least 0 and finite; 0 adds no noise")
        if self.s_churn and self.sampler != "heun":
            raise ValueError(
                f"the sampler {self.sampler} has no s_churn: leave it out, or choose the sampler heun"
            )
        if not 0 <= self.s_min < self.s_max:
            raise ValueError(f"s_min {self.s_min:g} and s_max {self.s_max:g}: 0 <= s_min < s_max must hold")
        if not 0 <= self.s_noise < math.inf:
            raise ValueError(f"s_noise {self.s_noise} must be at least 0 and finite")
        limits = (self.s_min, self.s_max) != (0.0, math.inf)
        if not self.s_churn and (limits or (self.s_noise != 1 and self.sampler != _SDE)):
            raise ValueError(
                f"s_min {self.s_min:g}, s_max {self.s_max:g} and s_noise {self.s_noise:g} have no effect without "
                "s_churn: give it a value above 0, or leave them out"
            )

    def sigmas(self) -> Tensor:
        """The schedule, see `edm2.diffusion.time_steps` and `edm2.diffusion.consistency_steps`."""
        assert self.num_steps is not None
        assert self.rho is not None
        if self.sampler == STUDENT_SAMPLER:
            return consistency_steps(self.num_steps, self.levels, self.sigma_max)
        return time_steps(self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    def sample(
        self,
        denoiser: DenoiserFn,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        guide: DenoiserFn | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        randn_like: Callable[[Tensor], Tensor],
        callback: Callback | None = None,
    ) -> Tensor:
        """Run the sampler.

        Args:
            denoiser: Main network.
            noise: `[B, C, H, W]` unit normal.
            labels: Passed to denoiser and guide.
            guide: Network to guide with.
            bounds: Lowest and highest value of clean images; needed with `clip_denoised`.
            randn_like: Draws unit noise of the shape of its argument.
            callback: Called at each step, as in `edm2.diffusion.sample_heun`.

        Returns:
            `[B, C, H, W]` float32.

        Raises:
            ValueError: If guidance lacks a guide, or images to be clipped have no range.
        """
        network = guided(denoiser, guide, self.guidance, self.interval)
        if self.clip_denoised:
            if bounds is None:
                raise ValueError("clip_denoised is for models of pixels, whose range is known: leave it out")
            network = clipped(network, *bounds)
        run = find_sampler(self.sampler) if isinstance(self.sampler, str) else self.sampler
        extra: dict[str, Any] = {}
        if self.s_churn:
            extra["churn"] = Churn(self.s_churn, self.s_min, self.s_max, self.s_noise, randn_like)
        elif self.sampler == STUDENT_SAMPLER:
            extra = {"randn_like": randn_like}
        elif self.sampler == _SDE:
            extra = {"s_noise": self.s_noise, "randn_like": randn_like}
        if callback is not None:
            extra["callback"] = callback
        return run(network, noise, self.sigmas(), labels, **extra)

    def to_json(self) -> dict[str, Any]:
        """Options for the record of samples: the main ones, and the others if they differ from the defaults."""
        told = {"name": self.sampler}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in _ALWAYS_TOLD or value != field.default:
                told[field.name] = value
        return told


def options_for(info: Mapping[str, Any], **options: Any) -> SamplerOptions:
    """Options of the sampler, with the defaults that suit a model.

    These are the highest noise level that its run chose, and for a student two steps of `consistency`.

    Args:
        info: What the model's file says about it.
        **options: Fields of `SamplerOptions`.

    Raises:
        ValueError: As in `SamplerOptions`, or if the sampler does not suit the model.
    """
    student = info.get("consistency")
    defaults: dict[str, Any] = {"sampler": STUDENT_SAMPLER, "num_steps": 2}
    if student is None:
        defaults = {"sigma_max": info.get("sigma_max", SamplerOptions.sigma_max)}
    chosen = SamplerOptions(**(defaults | options))
    if isinstance(chosen.sampler, str) and (student is None) == (chosen.sampler == STUDENT_SAMPLER):
        if student is None:
            raise ValueError(
                "the sampler consistency is for a student, and this model is not one: make one with `edm2 distill`, or "
                "use another sampler"
            )
        raise ValueError(
            f"the model is a student, which the sampler {chosen.sampler} does not suit: use consistency, or give the "
            "teacher"
        )
    if student is None or chosen.sigma_max == student["sigma_max"]:
        return chosen
    if chosen.sigma_max != SamplerOptions.sigma_max:
        raise ValueError(
            f"the student was trained to start at noise level {student['sigma_max']:g}, not at {chosen.sigma_max:g}: "
            "leave sigma_max out"
        )
    return dataclasses.replace(chosen, sigma_max=student["sigma_max"])
