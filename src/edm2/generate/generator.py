"""From a saved model to images: every image depends on its own seed alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.diffusion import Denoiser, DenoiserFn, load_model, sample_heun
from edm2.nn import keyed_normal, use_channels_last
from edm2.train.coding import Coding

_CHURN_STREAM = 1  # of the image's keyed random numbers; 0 is its starting noise


class Generator:
    """A denoiser with the coding of its images.

    Args:
        denoiser: in eval mode.
        coding: between network units and pixels.
        info: what the model's file says about it.

    Attributes:
        num_classes: 0 for an unconditional model.
        class_names: one a class, or empty.
    """

    def __init__(self, denoiser: Denoiser, coding: Coding, info: dict[str, Any] | None = None) -> None:
        self.denoiser, self.coding = denoiser, coding
        self.info = info or {}
        self.num_classes = denoiser.label_dim
        self.class_names = tuple(self.info.get("class_names", ()))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "Generator":
        """Open a saved model.

        Args:
            path: a model file, or the folder of a finished run or of one reconstruction.
            device: where to compute.

        Raises:
            ValueError: as in `edm2.diffusion.load_model`, or if the file does not say how images are coded.
        """
        denoiser, info = load_model(path, device=device)
        if "coding" not in info:
            raise ValueError(
                f"{path} does not say how its images are coded: load it with edm2.diffusion.load_model"
            )
        use_channels_last(denoiser)
        return cls(denoiser, Coding.from_json(info["coding"]), info)

    def labels_for(self, seeds: Sequence[int]) -> np.ndarray:
        """Default class of each seed: seed modulo the number of classes, `[N]` int64."""
        return np.asarray(seeds, np.int64) % max(self.num_classes, 1)

    def latents(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        guide: DenoiserFn | None = None,
        sampler: Callable[..., Tensor] = sample_heun,
        **options: Any,
    ) -> Tensor:
        """Sample in network units; see `images`.

        Returns:
            `[N, C, H, W]` float32.
        """
        device = next(self.denoiser.parameters()).device
        index = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        shape = (self.denoiser.img_channels, *self.denoiser.img_resolution)
        classes = None
        if self.num_classes:
            chosen = self.labels_for(seeds) if labels is None else np.asarray(labels, np.int64)
            if len(chosen) != len(index):
                raise ValueError(f"{len(chosen)} labels for {len(index)} seeds: give one each")
            wrong = chosen[(chosen < 0) | (chosen >= self.num_classes)]
            if len(wrong):
                raise ValueError(f"class {wrong[0]} is outside 0..{self.num_classes - 1}")
            classes = torch.from_numpy(chosen).to(device)
        elif labels is not None:
            raise ValueError("labels were given to an unconditional model: leave them out")

        calls = 0

        def randn_like(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return keyed_normal(index, shape, stream=_CHURN_STREAM + calls).to(x.dtype)

        return sampler(
            self.denoiser, keyed_normal(index, shape), classes, guide=guide, randn_like=randn_like, **options
        )

    def images(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        batch_size: int = 250,
        on_batch: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Sample images.

        Args:
            seeds: one per image; an image's noise, default class and churn come from its seed alone.
            labels: class of each image; default: seed modulo the number of classes.
            batch_size: images at a time.
            on_batch: called with the number of images after each batch.
            **options: guide, guidance, num_steps and the other options of the sampler.

        Returns:
            `[N, C, H, W]` uint8 for pixels; float32 in the data's units for float data and latents.

        Raises:
            ValueError: for labels that do not fit, or bad sampler options.
        """
        parts = []
        for part in _slices(len(seeds), batch_size):
            chosen = None if labels is None else labels[part]
            decoded = self.coding.decode(self.latents(seeds[part], chosen, **options))
            parts.append(decoded.cpu().numpy())
            if on_batch is not None:
                on_batch(len(parts[-1]))
        return np.concatenate(parts)


def _slices(count: int, size: int) -> Iterator[slice]:
    if count < 1 or size < 1:
        raise ValueError(f"{count} seeds in batches of {size}: both must be at least 1")
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
