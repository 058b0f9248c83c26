"""Denoisers made of other denoisers: guidance and clipping.

A denoiser is any callable `denoiser(x, sigma, labels)`. What is made here is one too, so that samplers need not know
of it.

Ref: EDM2 Eq. 11; autoguidance (arXiv 2406.02507); guidance in a limited interval (arXiv 2404.07724).
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edm2.diffusion.denoiser import GivenDenoiser


class DenoiserFn(Protocol):
    """Any denoiser: an `edm2.diffusion.Denoiser`, another network, or a closed form."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        """Noisy `[B, C, H, W]`, scalar noise level, labels -> the expected clean images, `[B, C, H, W]`."""


class WithoutLabels:
    """A conditional network without its label: the guide of classifier-free guidance by a single network.

    It suits networks that were trained with some labels missing. Network and guide are evaluated in one batch of
    twice the size where that is faster: for a single image on the CPU, for any batch elsewhere. (Two different
    networks are evaluated one after the other; stacked by `torch.vmap` they take longer.)

    Args:
        network: Denoiser that accepts labels None, and `[B, label_dim]` floats of which a row of zeros is a missing
            label. A `GivenDenoiser` keeps its condition and is evaluated without its vectors.
        label_dim: Number of classes, or length of a label vector.
    """

    def __init__(self, network: DenoiserFn, label_dim: int) -> None:
        self.network, self.label_dim = network, label_dim

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        """Evaluate without labels.

        Raises:
            ValueError: If the images have no labels to leave out.
        """
        bound = isinstance(self.network, GivenDenoiser) and self.network.vectors is not None
        if labels is None and not bound:
            raise ValueError("a guide without labels has no effect on images without labels: give labels")
        return self.network(x, sigma, x.new_zeros(len(x), self.label_dim) if bound else None)

    def both(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate with and without labels, in one batch."""
        known = labels if labels.is_floating_point() else one_hot(labels, self.label_dim).float()
        with_labels, without = self.network(
            torch.cat([x, x]), sigma, torch.cat([known, torch.zeros_like(known)])
        ).chunk(2)
        return with_labels, without


def guided(
    denoiser: DenoiserFn,
    guide: DenoiserFn | None,
    weight: float,
    interval: tuple[float, float] = (0.0, math.inf),
) -> DenoiserFn:
    """Extrapolate from a guide to a denoiser: `D_guide + weight (D - D_guide)`.

    Args:
        denoiser: The main network.
        guide: An unconditional network, or `WithoutLabels` of the main one (classifier-free guidance), or a weaker
            network (autoguidance).
        weight: 1 returns the denoiser itself, and the guide may be None.
        interval: Noise levels (low, high] at which the guide acts; elsewhere it is not evaluated. A limited interval
            needs a scalar sigma; where that lies on the CPU, comparing it does not wait for a GPU.

    Returns:
        A denoiser.

    Raises:
        ValueError: If the weight needs a guide, or the interval is empty.

    Ref: EDM2 Eq. 11; arXiv 2406.02507 Eq. 3; arXiv 2404.07724 Eq. 5.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"guidance interval ({low:g}, {high:g}] is empty: 0 <= low < high must hold")
    if weight == 1:
        return denoiser
    if guide is None:
        raise ValueError(f"guidance {weight} needs a guide: give one, or use weight 1 for no guidance")
    is_limited = interval != (0.0, math.inf)

    def guided_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        # Ends that are levels of the schedule count as such: both sides are rounded to sigma's precision.
        if is_limited and not (low < sigma and sigma <= high):
            return denoiser(x, sigma, labels)
        # On the CPU larger batches leave the cache, and one of twice the size took up to a fifth longer than two.
        small = len(x) == 1 or x.device.type != "cpu"
        if small and labels is not None and isinstance(guide, WithoutLabels) and guide.network is denoiser:
            main, reference = guide.both(x, sigma, labels)
        else:
            main, reference = denoiser(x, sigma, labels), guide(x, sigma, labels)
        return reference + weight * (main - reference)

    return guided_denoiser


def clipped(denoiser: DenoiserFn, low: Tensor | float, high: Tensor | float) -> DenoiserFn:
    """Clamp the output of a denoiser to the range of clean images.

    Args:
        denoiser: Any denoiser, such as a guided one, whose output may leave the range.
        low: Lowest value, a number or a tensor that broadcasts to `[B, C, H, W]`.
        high: Highest value, likewise.

    Returns:
        A denoiser.
    """

    def clipped_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        return torch.clamp(denoiser(x, sigma, labels), low, high)  # type: ignore[arg-type]

    return clipped_denoiser
