"""What the spectrum of the data says about noise: where the network can learn, and which noise hides everything.

A pattern of variance S (a spatial frequency of a channel) can be told from white noise of level sigma where S and
sigma^2 are of one size. The best linear denoiser leaves `S sigma^2 / (S + sigma^2)` of it. Weighted as in training
(EDM Eq. 8), its mean error is 1 for data without any structure, at every noise level; how far the error lies below 1 is
what structure gives, and training should see the noise levels where that is much.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from edm2.data import ImageDataset, measure_coding
from edm2.data.order import indices

_MOST_IMAGES, _MOST_VALUES = 1024, 1 << 24
_LEVELS = np.linspace(-8.0, 8.0, 321)  # ln sigma


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Noise levels that matter for some data, coded to zero mean and standard deviation sigma_data.

    Attributes:
        center: Mean of ln sigma, weighted with the share of the error that a linear denoiser removes.
        width: Standard deviation of ln sigma, likewise.
        strongest: Standard deviation of the strongest pattern. Noise hides it well above this level.
        num_images: Number of images measured.
    """

    center: float
    width: float
    strongest: float
    num_images: int


def measure_structure(dataset: ImageDataset, *, sigma_data: float = 0.5) -> Structure:
    """Measure the spectrum of a data set on up to 1,024 of its images.

    Args:
        dataset: Images of bytes or floats; missing values (NaN) count as the mean.
        sigma_data: Standard deviation of the coded data.

    Raises:
        ValueError: If a channel is constant, as in `edm2.data.measure_coding`.
    """
    count = max(1, min(len(dataset), _MOST_IMAGES, _MOST_VALUES // math.prod(dataset.image_shape)))
    coding = measure_coding(dataset, sample=count, sigma_data=sigma_data)
    power = np.zeros(dataset.image_shape)
    for start in range(0, count, 64):
        chosen = np.sort(indices(start, min(64, count - start), size=len(dataset), seed=0))
        coded = np.nan_to_num(coding.encode(torch.from_numpy(dataset.images(chosen))).numpy())
        power += np.square(np.abs(np.fft.fft2(coded, norm="ortho"))).sum(0)
    center, width = helpful_levels(power / count, sigma_data)
    return Structure(center=center, width=width, strongest=math.sqrt(power.max() / count), num_images=count)


def helpful_levels(power: np.ndarray, sigma_data: float) -> tuple[float, float]:
    """Mean and standard deviation of the ln sigma at which a linear denoiser makes use of the spectrum.

    Args:
        power: Variance of each Fourier coefficient, of any shape, in the units of coded data.
        sigma_data: Square root of their mean.

    Returns:
        Mean and standard deviation; (ln sigma_data, 0) for white data, which has no structure.
    """
    variance = np.exp(2 * _LEVELS)
    values, counts = np.unique(np.float32(power), return_counts=True)
    error = np.zeros_like(variance)
    for part, times in zip(np.array_split(values, 64), np.array_split(counts, 64), strict=True):
        error += (part[:, None] * variance / (part[:, None] + variance) * times[:, None]).sum(0)
    weight = (variance + sigma_data**2) / (variance * sigma_data**2)
    gain = np.maximum(1 - weight * error / power.size, 0)
    if gain.max() < 1e-3:
        return math.log(sigma_data), 0.0
    mean = float((gain * _LEVELS).sum() / gain.sum())
    return mean, math.sqrt(float((gain * (_LEVELS - mean) ** 2).sum() / gain.sum()))
