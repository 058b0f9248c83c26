"""Noise distribution and training loss.

Ref: EDM2 Eq. 13-17 and 21.
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
    **kwargs: Any,
) -> Tensor:
    """Squared error weighted by noise level and learned uncertainty: `lambda / exp(u) (D - y)^2 + u`.

    Without a learned uncertainty u is 0, and this is the loss of EDM.

    Args:
        denoiser: Called as `denoiser(noisy, sigma, labels, return_logvar=True, **kwargs)`.
        images: `[B, C, H, W]` clean, in units where their standard deviation is sigma_data.
        labels: As the denoiser takes them.
        sigma: `[B]` noise level of each image, > 0.
        noise: `[B, C, H, W]` unit normal.
        **kwargs: Passed to the denoiser: condition, augment_labels, dropout_index, dropout_seed.

    Returns:
        `[B, C, H, W]` loss of each element. For gradients, sum over everything and divide by the batch size.

    Ref: EDM2 Eq. 21, with u added to every element, as in the released networks: u is the log of the mean error.
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    sigma_data = denoiser.sigma_data
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised, logvar = denoiser(images + sigma * noise, sigma, labels, return_logvar=True, **kwargs)
    loss: Tensor = weight / logvar.exp() * (denoised - images) ** 2 + logvar
    return loss


def draw_sigma(index: Tensor, *, p_mean: float, p_std: float, seed: int = 0, stream: int = 0) -> Tensor:
    """Noise levels for training, `ln sigma ~ N(p_mean, p_std^2)`, as a function of (seed, index).

    Args:
        index: `[B]` int64 positions of the images in the run.
        p_mean: Mean of ln sigma.
        p_std: Standard deviation of ln sigma.
        seed: Seed of the run.
        stream: See `edm2.nn.keyed_bits`.

    Returns:
        `[B]` float32.
    """
    return torch.exp(p_mean + p_std * keyed_normal(index, seed=seed, stream=stream))
