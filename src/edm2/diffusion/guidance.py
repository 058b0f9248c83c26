"""Guidance: steering one denoiser away from another.

Ref: EDM2 Eq. 11; autoguidance (arXiv 2406.02507); limited interval (arXiv 2404.07724); SPEC section 6.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class DenoiserFn(Protocol):
    """Any denoiser: an `edm2.diffusion.Denoiser`, another network, or a closed form."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        """Noisy `[B, C, H, W]`, sigma scalar, labels -> the expected clean images, `[B, C, H, W]`."""


class WithoutLabels:
    """A conditional network without its label, as a guide of itself: classifier-free guidance by one network.

    Of use for a network that was trained with labels missing now and then. It is evaluated together with the main
    network where that is faster: in one batch of twice the size for a single image on the CPU, and for any batch
    elsewhere. Two networks are always evaluated one after the other: stacked by `torch.vmap` they take longer.

    Args:
        network: called with labels None, and with `[B, label_dim]` floats, where a row of zeros is a missing label.
        label_dim: number of classes, or length of a label vector.
    """

    def __init__(self, network: DenoiserFn, label_dim: int) -> None:
        self.network, self.label_dim = network, label_dim

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        """Evaluate without labels.

        Raises:
            ValueError: if there are none to leave out.
        """
        if labels is None:
            raise ValueError("a guide without labels has no effect where the images have none: give labels")
        return self.network(x, sigma, None)

    def both(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate with and without labels, together."""
        known = labels if labels.is_floating_point() else one_hot(labels, self.label_dim).float()
        with_labels, without = self.network(
            torch.cat([x, x]), sigma, torch.cat([known, torch.zeros_like(known)])
        ).chunk(2)
        return with_labels, without


def guided(denoiser: DenoiserFn, guide: DenoiserFn | None, guidance: float) -> DenoiserFn:
    """Extrapolate from a guide to the main denoiser: `D_guide + w (D_main - D_guide)`.

    Args:
        denoiser: the main network.
        guide: an unconditional network, or the same `WithoutLabels` (classifier-free guidance); a weaker one
            (autoguidance); or None.
        guidance: w; 1 leaves the main network alone, and the guide is not run.

    Raises:
        ValueError: for a guidance weight other than 1 without a guide, or one that is not finite.

    Ref: EDM2 Eq. 11; arXiv 2406.02507 Eq. 3.
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance {guidance} must be finite")
    if guidance == 1:
        return denoiser
    if guide is None:
        raise ValueError(f"guidance {guidance} needs a guide: pass guide=..., or guidance=1 for none")

    def guided_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        # On the CPU larger batches leave the cache, and one of twice the size took up to a fifth longer than two.
        small = len(x) == 1 or x.device.type != "cpu"
        if small and labels is not None and isinstance(guide, WithoutLabels) and guide.network is denoiser:
            main, reference = guide.both(x, sigma, labels)
        else:
            main, reference = denoiser(x, sigma, labels), guide(x, sigma, labels)
        return reference + guidance * (main - reference)

    return guided_denoiser


def guided_by_level(
    denoiser: DenoiserFn,
    guide: DenoiserFn | None,
    guidance: float,
    interval: tuple[float, float],
    levels: Sequence[float],
) -> Callable[[float], DenoiserFn]:
    """The denoiser to use at each noise level, chosen without asking the device for a value.

    Args:
        denoiser: as in `guided`.
        guide: as in `guided`.
        guidance: as in `guided`.
        interval: guidance acts for sigma in (low, high]; elsewhere the guide is not run.
        levels: noise levels of the schedule.

    Raises:
        ValueError: as in `guided`; for an interval that is empty, holds no level, or limits nothing.

    Ref: arXiv 2404.07724 Eq. 5.
    """
    inside = guided(denoiser, guide, guidance)
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"interval ({low:g}, {high:g}] of guidance: 0 <= low < high must hold")
    if guidance == 1 and (low, high) != (0, math.inf):
        raise ValueError(
            f"interval ({low:g}, {high:g}] of guidance, but guidance 1 is none: give a weight and a guide"
        )
    if not any(low < level <= high for level in levels):
        raise ValueError(
            f"interval ({low:g}, {high:g}] of guidance holds none of the schedule's noise levels, {min(levels):g} to "
            f"{max(levels):g}: choose one that does"
        )
    return lambda level: inside if low < level <= high else denoiser
