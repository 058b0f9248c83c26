"""From the stored images of a data set to network inputs, and back."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edm2.data import FloatCoding, ImageDataset, PixelCoding, coding_warning, measure_coding
from edm2.nn import keyed_normal
from edm2.train.config import TrainConfig

_LATENT_STREAM = 2  # of keyed random numbers; 0 and 1 are the noise level and the noise


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How stored images become network units.

    Attributes:
        kind: Pixels (bytes), floats, or latents (channels of means, then of standard deviations).
        values: Mean, standard deviation and sigma_data.
        num_channels: Channels of the network's images.
    """

    kind: Literal["pixels", "floats", "latents"]
    values: FloatCoding
    num_channels: int

    def encode(self, stored: Tensor, index: Tensor, *, seed: int) -> Tensor:
        """Stored images to network units.

        Args:
            stored: `[B, ...]` images of the data set.
            index: `[B]` int64 that determines which latent is drawn.
            seed: Seed of the run.

        Returns:
            `[B, num_channels, H, W]` float32.
        """
        if self.kind == "latents":
            mean, std = stored.float().chunk(2, dim=1)
            stored = mean + std * keyed_normal(index, mean.shape[1:], seed=seed, stream=_LATENT_STREAM)
        return self.values.encode(stored)

    def decode(self, x: Tensor) -> Tensor:
        """Network units to bytes, or to the data's own units for floats and latents."""
        return self.values.decode(x)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.values).items()}
        return {"kind": self.kind, "num_channels": self.num_channels, **values}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Coding":
        """The inverse of `to_json`, for values from a file.

        Raises:
            ValueError: If edm2 does not write such values.
        """
        try:
            made = {"pixels": PixelCoding, "floats": FloatCoding, "latents": FloatCoding}[content["kind"]]
            values = made(
                mean=tuple(content["mean"]), std=tuple(content["std"]), sigma_data=content["sigma_data"]
            )
            num_channels = content["num_channels"]
            if type(num_channels) is not int or num_channels < 1:
                raise ValueError("num_channels must be a whole number of at least 1")
            if not {len(values.mean), len(values.std)} <= {1, num_channels}:
                raise ValueError(f"mean and std must have 1 or {num_channels} values")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a coding of images that edm2 does not write ({str(error)[:200]})") from error
        return cls(kind=content["kind"], values=values, num_channels=num_channels)


def make_coding(config: TrainConfig, dataset: ImageDataset) -> Coding:
    """The coding that the settings ask for, on this data.

    Warns if the magnitude of coded data is far from what the network expects.

    Raises:
        ValueError: If the coding does not fit the images' type or number of channels.
    """
    options, sigma_data = config.dataset, config.loss.sigma_data
    channels = dataset.image_shape[0]
    bytes_ = dataset.dtype == np.uint8
    if options.coding == "latents":
        if bytes_ or channels % 2:
            raise ValueError(
                f"coding latents needs float images with an even number of channels, means then standard deviations; "
                f"{dataset.name!r} has {channels} channels of {dataset.dtype}"
            )
        values = FloatCoding(mean=options.mean, std=options.std, sigma_data=sigma_data)
        _warn_if_far(dataset, values, latents=True)
        return Coding(kind="latents", values=values, num_channels=channels // 2)
    if options.coding == "measured":
        values = measure_coding(dataset, sigma_data=sigma_data)
    else:
        made = PixelCoding if bytes_ else FloatCoding
        given = {} if options.coding == "plain" else {"mean": options.mean, "std": options.std}
        values = made(**given, sigma_data=sigma_data)
        _warn_if_far(dataset, values)
    coding = Coding(kind="pixels" if bytes_ else "floats", values=values, num_channels=channels)
    coding.encode(torch.from_numpy(dataset.images(np.arange(1))), torch.zeros(1, dtype=torch.int64), seed=0)
    return coding


def _warn_if_far(dataset: ImageDataset, values: FloatCoding, *, latents: bool = False) -> None:
    warning = coding_warning(dataset, values, latents=latents)
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
