"""Coding between stored images and network units, which have zero mean and standard deviation sigma_data.

The preconditioning (EDM2 Eq. 1) assumes data of that magnitude; otherwise the network's input is not of unit magnitude.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edm2.data.dataset import ImageDataset
from edm2.data.order import indices


@dataclass(frozen=True, kw_only=True)
class FloatCoding:
    """Coding of float images such as latents: `(x - mean) / std * sigma_data` per channel.

    Args:
        mean: Mean of the data, for each channel or for all.
        std: Standard deviation of the data, for each channel or for all, above 0.
        sigma_data: Standard deviation of the coded data, above 0.

    Raises:
        ValueError: If a value is not finite or not above 0, or numbers of channels differ.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (0.5,)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not (all(map(math.isfinite, (*self.mean, *self.std, self.sigma_data))) and self.mean and self.std):
            raise ValueError(
                f"mean {self.mean}, std {self.std} and sigma_data {self.sigma_data} must be finite"
            )
        if min(*self.std, self.sigma_data) <= 0:
            raise ValueError(f"std {self.std} and sigma_data {self.sigma_data} must be above 0")
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}: "
                "give one for each channel, or one for all"
            )

    def encode(self, images: Tensor) -> Tensor:
        """Stored images to network units, `[B, C, H, W]` float to float32."""
        if not images.is_floating_point():
            raise ValueError(f"FloatCoding takes float images, not {images.dtype}: PixelCoding is for uint8")
        return self._standardise(images.float())

    def decode(self, x: Tensor) -> Tensor:
        """Network units back to data, `[B, C, H, W]` float32."""
        return self._restore(x)

    def _standardise(self, x: Tensor) -> Tensor:
        mean, std = self._moments(x)
        return (x - mean) * (self.sigma_data / std)

    def _restore(self, x: Tensor) -> Tensor:
        mean, std = self._moments(x)
        return x.float() * (std / self.sigma_data) + mean

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = max(len(self.mean), len(self.std))
        if channels not in (1, x.shape[1]):
            raise ValueError(f"the coding is for {channels} channels, the images have {x.shape[1]}")
        mean, std = (torch.tensor(v, device=x.device).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True, kw_only=True)
class PixelCoding(FloatCoding):
    """Coding of uint8 images: x / 127.5 - 1, then as in `FloatCoding`.

    The defaults leave x / 127.5 - 1 as it is. Decoding undoes encoding exactly.

    Args:
        mean: Mean of x / 127.5 - 1, for each channel or for all.
        std: Standard deviation of x / 127.5 - 1, for each channel or for all, above 0.
        sigma_data: Standard deviation of the coded data.
    """

    def encode(self, images: Tensor) -> Tensor:
        """Pixels to network units, `[B, C, H, W]` uint8 to float32."""
        if images.dtype != torch.uint8:
            raise ValueError(f"PixelCoding takes uint8 images, not {images.dtype}: FloatCoding is for floats")
        return self._standardise(images.float() / 127.5 - 1)

    def decode(self, x: Tensor) -> Tensor:
        """Network units to pixels, `[B, C, H, W]` uint8."""
        return (self._restore(x) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def measure_coding(
    dataset: ImageDataset, *, sample: int = 10_000, sigma_data: float = 0.5, latents: bool = False
) -> FloatCoding:
    """Measure the coding that gives every channel zero mean and standard deviation sigma_data.

    Args:
        dataset: Images of bytes give a `PixelCoding`, float ones a `FloatCoding`.
        sample: Number of images to measure, drawn by a fixed rule; all images if there are fewer.
        sigma_data: Standard deviation of the coded data.
        latents: Whether the channels are the means, then the standard deviations, of the coded values.

    Returns:
        The coding, with one mean and one standard deviation for each channel.

    Raises:
        ValueError: If a channel is constant over the data set.
    """
    mean, square = _channel_moments(dataset, sample, latents)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # Below this share of the mean, the difference of squares is rounding.
    flat = np.flatnonzero(std <= 1e-6 * np.abs(mean))
    if len(flat):
        raise ValueError(
            f"channel {flat[0]} of data set {dataset.name!r} is constant ({mean[flat[0]]:.6g}): "
            "leave such channels out of the images"
        )
    kind = PixelCoding if dataset.dtype == np.uint8 else FloatCoding
    return kind(mean=tuple(mean.tolist()), std=tuple(std.tolist()), sigma_data=sigma_data)


def coding_warning(
    dataset: ImageDataset, coding: FloatCoding, *, sample: int = 2000, latents: bool = False
) -> str | None:
    """Check that coded data has the magnitude that the network expects.

    The measure is the root mean square, because the preconditioning assumes that the mean is zero.

    Args:
        dataset: The training data.
        coding: Its coding.
        sample: Number of images to measure.
        latents: See `measure_coding`.

    Returns:
        A warning with the remedy, or None if the magnitude is within a factor 1.5 of sigma_data.

    Raises:
        ValueError: If the coding does not fit the images' type or number of channels.
    """
    mean, square = _channel_moments(dataset, sample, latents)
    coding.encode(torch.from_numpy(dataset.images(np.arange(1))[:, : len(mean)]))
    shift, std = np.array(coding.mean), np.array(coding.std)
    coded = (square - 2 * shift * mean + shift**2) * (coding.sigma_data / std) ** 2
    magnitude = math.sqrt(max(coded.mean(), 0))
    if coding.sigma_data / 1.5 <= magnitude <= coding.sigma_data * 1.5:
        return None
    try:
        better = measure_coding(dataset, sample=sample, sigma_data=coding.sigma_data, latents=latents)
        fix = f"code it with mean {_rounded(better.mean)} and std {_rounded(better.std)}"
    except ValueError as error:
        fix = str(error)
    return (
        f"data set {dataset.name!r} has magnitude {magnitude:.3f} after coding, far from sigma_data "
        f"{coding.sigma_data:g}: {fix}"
    )


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


def _channel_moments(dataset: ImageDataset, sample: int, latents: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of each channel in float64, of x / 127.5 - 1 or of the floats."""
    if sample < 1:
        raise ValueError(f"sample {sample} must be at least 1")
    sample = min(sample, len(dataset))
    total = np.zeros((2, dataset.image_shape[0]))
    known: np.ndarray | int = 0
    for start in range(0, sample, 256):
        chosen = indices(start, min(256, sample - start), size=len(dataset), seed=0)
        values = dataset.images(np.sort(chosen)).astype(np.float64)
        if dataset.dtype == np.uint8:
            values = values / 127.5 - 1
        if dataset.missing:
            known = known + np.isfinite(values).sum((0, 2, 3))
            values = np.nan_to_num(values)
        else:
            known = known + values[:, 0].size
        total += [values.sum((0, 2, 3)), np.square(values).sum((0, 2, 3))]
    if np.any(known == 0):
        raise ValueError(
            f"channel {int(np.argmin(known))} of data set {dataset.name!r} has no value that is not missing: leave "
            "it out of the images"
        )
    mean, square = total / known
    if not latents:
        return mean, square
    half = len(mean) // 2
    return mean[:half], square[:half] + square[half:]
