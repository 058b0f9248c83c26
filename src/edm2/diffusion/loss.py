"""Noise distribution and training loss.

Ref: EDM2 Eq. 13-17 and 21; SPEC section 3.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from edm2.nn import keyed_normal


class TrainableDenoiser(Protocol):
    """What the loss needs: a denoiser that also reports its uncertainty, and the data's `sigma_data`."""

    sigma_data: float

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        return_logvar: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`[B, C, H, W]` -> (denoised, logvar) with `return_logvar`."""


def edm2_loss(
    denoiser: TrainableDenoiser,
    images: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    *,
    uncertainty_once: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Squared error weighted by noise level and learned uncertainty: `lambda / exp(u) (D - y)^2 + u`.

    In config A, u is 0 and this is the loss of EDM, but for `TrainingRules.loss_scaling`.

    Args:
        denoiser: called as `denoiser(noisy, sigma, labels, return_logvar=True, **kwargs)`.
        images: `[B, C, H, W]` clean, in units where their standard deviation is sigma_data.
        labels: as the denoiser takes them.
        sigma: `[B]` noise level of each image, > 0.
        noise: `[B, C, H, W]` unit normal.
        uncertainty_once: spread u over an image's elements, so that it counts once in their sum, as Eq. 21 can
            be read; u then settles at the log of the summed error. By default u is added to every element, as
            the released networks were trained, and settles at the log of the mean error.
        **kwargs: passed on: condition, augment_labels, dropout_index, dropout_seed.

    Returns:
        `[B, C, H, W]` loss of each element. For gradients, sum over everything and divide by the batch size.

    Ref: EDM2 Eq. 21, with u added to every element (LADDER section 16.6).
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    sigma_data = denoiser.sigma_data
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised, logvar = denoiser(images + sigma * noise, sigma, labels, return_logvar=True, **kwargs)
    share = logvar / images[0].numel() if uncertainty_once else logvar
    loss: Tensor = weight / logvar.exp() * (denoised - images) ** 2 + share
    return loss


def draw_sigma(index: Tensor, *, p_mean: float, p_std: float, seed: int = 0, stream: int = 0) -> Tensor:
    """Noise levels for training, `ln sigma ~ N(p_mean, p_std^2)`, as a function of (seed, index).

    Args:
        index: `[B]` int64 positions of the images in the run.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        seed: seed of the run.
        stream: see `edm2.nn.keyed_bits`.

    Returns:
        `[B]` float32.
    """
    return torch.exp(p_mean + p_std * keyed_normal(index, seed=seed, stream=stream))
