"""Images from a run while it trains: the same seeds at regular moments, with one of its averages."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from edm2.data import ImageDataset, LatentDecoder
from edm2.data.views import rows_like
from edm2.ema import sigma_rel_to_gamma
from edm2.ema.maths.solve import solve_live
from edm2.generate import ImageGenerator
from edm2.generate.sampler_options import STUDENT_SAMPLER
from edm2.report import case_grid, class_grid, save_png
from edm2.report.grids import stacked
from edm2.train import Trainer

FOLDER = "progress"
_MOST_CASES = 12
_GAP = 16  # pixels between generated and real images


@dataclass(frozen=True, kw_only=True)
class LiveSamples:
    """A callback that writes `progress/000000012800.png` into the run's folder: `train(..., on_step=LiveSamples(...))`.

    Below the generated images are as many training images, of the same classes.

    Attributes:
        every: Training images between grids; the end of the run gets one, too.
        sigma_rel: EMA length; default: the longest tracked one.
        num_samples: Number of images, of seeds 0, 1, ...
        num_steps: Noise levels of the sampler.
        decoder: Decoder of a latent model's latents, with which pictures are drawn instead of channels.

    Raises:
        ValueError: If a value is out of range.
    """

    every: int
    sigma_rel: float | None = None
    num_samples: int = 32
    num_steps: int = 16
    decoder: LatentDecoder | None = None

    def __post_init__(self) -> None:
        for name in ("every", "num_samples", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.sigma_rel is not None:
            sigma_rel_to_gamma(self.sigma_rel)

    def check(self, tracked: Sequence[float]) -> None:
        """Check, before a run starts, that its averages can give the wanted one.

        Args:
            tracked: EMA lengths that the run tracks.

        Raises:
            ValueError: If they cannot.
        """
        if self.sigma_rel is not None and self.sigma_rel not in tracked:
            solve_live(tracked, self.sigma_rel)

    def __call__(self, trainer: Trainer) -> None:
        """Make a grid if one is due; the run's weights are restored bit for bit.

        If the network is sharded, all processes make the grid together, and the first one writes it.
        """
        if trainer.ema is None or not trainer.is_due(self.every):
            return
        denoiser = trainer.denoiser
        sigma_rel = max(trainer.ema.sigma_rels) if self.sigma_rel is None else self.sigma_rel
        with trainer.ema.applied(denoiser, sigma_rel):
            denoiser.eval()
            try:
                generator = ImageGenerator(
                    denoiser, trainer.coding, trainer.info, decoder=self.decoder, residual=trainer.residual
                )
                given, truth = _examples(trainer, self.num_samples)
                seeds = range(self.num_samples if truth is None else len(truth))
                sampler = STUDENT_SAMPLER if generator.is_student else "dpmpp-2m"
                images = generator.images(seeds, num_steps=self.num_steps, sampler=sampler, **given)
            except FloatingPointError as error:
                return warnings.warn(f"no samples after {trainer.num_images:,} images: {error}", stacklevel=2)
            finally:
                denoiser.train()
        if not trainer.world.is_first:
            return
        if truth is None:
            grid = self._above_real(images, generator, trainer.dataset)
        else:
            truth = self._decoded(truth)
            conditions = [self._decoded(given["conditions"])] if "conditions" in given else []
            rows = [(shown, shown) for shown in conditions]
            grid = case_grid([*rows, (images, truth), (truth, truth)])
        save_png(grid, self.path(trainer.out, trainer.num_images))
        trainer.log_image("samples", np.asarray(grid.convert("RGB")))

    def _above_real(
        self, images: np.ndarray, generator: ImageGenerator, dataset: ImageDataset
    ) -> PIL.Image.Image:
        classes = generator.num_classes
        rows = rows_like(dataset, [int(label) for label in generator.labels_for(range(len(images)))])
        real = self._decoded(dataset.images(rows)[:, : generator.coding.num_channels])
        above = class_grid(_shown(images), classes, generator.class_names)
        return stacked([above, class_grid(_shown(real), classes)], gap=_GAP)

    def _decoded(self, images: np.ndarray) -> np.ndarray:
        """Pictures of latents, of their means where standard deviations follow; other images as they are."""
        if self.decoder is None or images.dtype == np.uint8:
            return images
        if images.shape[1] not in (self.decoder.latent_channels, 2 * self.decoder.latent_channels):
            return images
        return self.decoder(torch.from_numpy(images[:, : self.decoder.latent_channels])).numpy()

    @staticmethod
    def path(out: Path, num_images: int) -> Path:
        """Return the file of a grid."""
        return out / FOLDER / f"{num_images:012d}.png"


def _examples(trainer: Trainer, count: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a model of pairs is given for a few cases, held-out ones where there are any, and what they really were."""
    dataset = trainer.dataset if trainer.held_out is None else trainer.held_out
    if dataset.conditions is None and not dataset.vector_dim:
        return {}, None
    rows = np.arange(min(count, len(dataset), _MOST_CASES))
    given = dataset.given(rows)
    if dataset.num_classes:
        given["labels"] = dataset.labels(rows)
    return given, dataset.images(rows)[:, : trainer.coding.num_channels]


def _shown(images: np.ndarray) -> np.ndarray:
    """Pictures as they are; latents and floats have no colours, so that each channel is stretched to its range."""
    return images if images.dtype == np.uint8 else _stretched(images)


def _stretched(images: np.ndarray) -> np.ndarray:
    low = images.min(axis=(0, 2, 3), keepdims=True)
    high = images.max(axis=(0, 2, 3), keepdims=True)
    stretched: np.ndarray = 255 * (images - low) / np.maximum(high - low, 1e-12)
    return np.round(stretched).astype(np.uint8)
