"""What a network is trained for: the loss of a batch.

The stepper turns stored images into a `TrainingBatch`; an `Objective` computes its loss with the network. All that an
objective draws is a function of (seed, position of the image in the run), so that any run resumes bit for bit.

Ref: EDM2 Sec. 2-3.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from edm2.diffusion.loss import TrainableDenoiser, draw_sigma, edm2_loss
from edm2.nn import keyed_normal
from edm2.train.config import TrainConfig

# Streams of keyed random numbers; dropout blocks count up from 0 under a seed of their own.
SIGMA_STREAM, NOISE_STREAM, _VALIDATION = 0, 1, 64
_LEVELS = 8
MEAN_SIGMA = 80.0  # noise level that a regression sees
DROPOUT_SEED_OFFSET = 1 << 62


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A batch, or a microbatch, as the network takes it.

    Attributes:
        images: `[B, C, H, W]` clean images in network units.
        index: `[B]` int64 positions of the images in the run, the index of all keyed random numbers.
        num_images: Images seen before this step, the same for all microbatches.
        labels: As the denoiser takes them; None without labels.
        condition: `[B, cond_channels, H, W]` of unit magnitude, images given as a condition; None without any.
        mask: `[B, C, H, W]` bool, False where the value of an image is missing (0 in `images`), whose loss does not
            count; None if all are known.
        augment_labels: `[B, augment_dim]`, how the images were augmented; None if they were not.
    """

    images: Tensor
    index: Tensor
    num_images: int
    labels: Tensor | None = None
    condition: Tensor | None = None
    mask: Tensor | None = None
    augment_labels: Tensor | None = None

    def network_arguments(self, seed: int) -> dict[str, Any]:
        """What the denoiser is given besides noisy images, noise level and labels.

        Args:
            seed: Seed of the run.
        """
        given = {} if self.condition is None else {"condition": self.condition}
        return {
            **given,
            "augment_labels": self.augment_labels,
            "dropout_index": self.index,
            "dropout_seed": seed + DROPOUT_SEED_OFFSET,
        }


class Objective(Protocol):
    """A loss to train a network with."""

    def __call__(self, denoiser: TrainableDenoiser, batch: TrainingBatch, /) -> Tensor:
        """Compute the loss.

        Args:
            denoiser: The network in training mode, possibly compiled or wrapped for several processes.
            batch: Its share of the step's images.

        Returns:
            `[B, C, H, W]` loss of each element, or `[B, 1, 1, 1]` of each image. The trainer leaves out missing
            elements, sums, and divides by the batch size.
        """


@runtime_checkable
class ValidatedObjective(Objective, Protocol):
    """An objective whose loss can be followed on held-out images.

    Attributes:
        levels: Noise levels at which it is measured.
    """

    @property
    def levels(self) -> tuple[float, ...]: ...  # noqa: D102 - described above

    def validation_loss(self, denoiser: TrainableDenoiser, batch: TrainingBatch, level: int) -> Tensor:
        """Squared error at one of the levels, weighted as in training but for the uncertainty, `[B, C, H, W]`."""


@dataclass(frozen=True)
class DenoisingObjective:
    """The loss of EDM2: remove noise of random levels.

    Args:
        config: All settings.

    Ref: EDM2 Eq. 21.
    """

    config: TrainConfig

    def __call__(self, denoiser: TrainableDenoiser, batch: TrainingBatch, /) -> Tensor:
        """Compute the loss of each element; see `Objective`."""
        loss, seed = self.config.loss, self.config.seed
        sigma = draw_sigma(batch.index, p_mean=loss.p_mean, p_std=loss.p_std, seed=seed, stream=SIGMA_STREAM)
        noise = keyed_normal(batch.index, batch.images.shape[1:], seed=seed, stream=NOISE_STREAM)
        return edm2_loss(denoiser, batch.images, batch.labels, sigma, noise, **batch.network_arguments(seed))

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels that training draws equally often: medians of equal shares of their distribution."""
        loss = self.config.loss
        normal = NormalDist(loss.p_mean, loss.p_std)
        return tuple(math.exp(normal.inv_cdf((i + 0.5) / _LEVELS)) for i in range(_LEVELS))

    def validation_loss(self, denoiser: TrainableDenoiser, batch: TrainingBatch, level: int) -> Tensor:
        """See `ValidatedObjective`."""
        seed = self.config.seed
        noise = keyed_normal(batch.index, batch.images.shape[1:], seed=seed, stream=_VALIDATION + level)
        level_sigma, sigma_data = self.levels[level], denoiser.sigma_data
        sigma = torch.full((len(batch.images), 1, 1, 1), level_sigma, device=batch.images.device)
        weight = (level_sigma**2 + sigma_data**2) / (level_sigma * sigma_data) ** 2
        noisy = batch.images + sigma * noise
        denoised: Tensor = denoiser(noisy, sigma, batch.labels, **batch.network_arguments(seed))
        return weight * (denoised - batch.images) ** 2


@dataclass(frozen=True)
class MeanObjective:
    """Regression: the network expects the image from its label and condition, without seeing a noisy one.

    It sees a fixed, high noise level, and zeros in place of the noisy image. The loss is that of EDM2 there.

    Args:
        config: All settings.
    """

    config: TrainConfig

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level that the network sees."""
        return (MEAN_SIGMA,)

    def __call__(self, denoiser: TrainableDenoiser, batch: TrainingBatch, /) -> Tensor:
        """Compute the loss of each element; see `Objective`."""
        error, logvar = self._error(denoiser, batch)
        return error / logvar.exp() + logvar

    def validation_loss(self, denoiser: TrainableDenoiser, batch: TrainingBatch, level: int) -> Tensor:
        """See `ValidatedObjective`."""
        return self._error(denoiser, batch)[0]

    def _error(self, denoiser: TrainableDenoiser, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        sigma = torch.full((len(batch.images),), MEAN_SIGMA, device=batch.images.device)
        given = batch.network_arguments(self.config.seed)
        zeros = torch.zeros_like(batch.images)
        expected, logvar = denoiser(zeros, sigma, batch.labels, return_logvar=True, **given)
        weight = 1 / denoiser.sigma_data**2 + 1 / MEAN_SIGMA**2
        return weight * (expected - batch.images) ** 2, logvar


def make_objective(config: TrainConfig) -> Objective:
    """The objective that the settings ask for."""
    if config.objective == "mean":
        return MeanObjective(config)
    return DenoisingObjective(config)
