"""What the spectrum of the data says about noise: where the network can learn, and which noise hides everything.

A pattern of variance S (a spatial frequency of a channel) can be told from white noise of level sigma where S and
sigma^2 are of one size. The best linear denoiser leaves `S sigma^2 / (S + sigma^2)` of it. Weighted as in training
(EDM Eq. 8), its mean error is 1 for data without any structure, at every noise level; how far the error lies below 1 is
what structure gives, and training should see the noise levels where that is much.

A condition tells much about the strong patterns. What a linear function of it leaves of the variance is what samples
must add. There the levels count at which that variance is revealed, d/dln(sigma) of `S sigma^2 / (S + sigma^2)`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from edm2.data import ImageDataset, measure_coding
from edm2.data.order import indices

_MOST_IMAGES, _MOST_VALUES = 1024, 1 << 24
_EXACT = 1 - 1e-6  # share from which a condition leaves nothing but rounding
_LEVELS = np.linspace(-8.0, 8.0, 321)  # ln sigma


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Noise levels that matter for some data, coded to zero mean and standard deviation sigma_data.

    Attributes:
        center: Mean of ln sigma, weighted with the share of the error that a linear denoiser removes, or, with
            conditions, with the variance that is revealed.
        width: Standard deviation of ln sigma, likewise.
        strongest: Standard deviation of the strongest pattern. Noise hides it well above this level.
        num_images: Number of images measured.
        explained: Share of the variance that a linear function of the condition explains; None without conditions.
    """

    center: float
    width: float
    strongest: float
    num_images: int
    explained: float | None = None


def measure_structure(dataset: ImageDataset, *, sigma_data: float = 0.5) -> Structure:
    """Measure the spectrum of a data set on up to 1,024 of its images, and of what their conditions leave of it.

    Args:
        dataset: Images of bytes or floats; missing values (NaN) count as the mean.
        sigma_data: Standard deviation of the coded data.

    Raises:
        ValueError: If a channel is constant, as in `edm2.data.measure_coding`.
    """
    conditions, size = dataset.conditions, dataset.image_shape[1:]
    channels = dataset.image_shape[0] + (0 if conditions is None else conditions.image_shape[0])
    count = max(1, min(len(dataset), _MOST_IMAGES, _MOST_VALUES // (channels * math.prod(size))))
    rows = np.sort(indices(0, count, size=len(dataset), seed=0))
    waves = _waves(dataset, rows, size, sigma_data)
    power = waves.abs().square().double().mean(0).numpy()
    center, width = helpful_levels(power, sigma_data)
    explained = None
    if conditions is not None and count >= 2 * conditions.image_shape[0]:
        left = _unexplained(waves, _waves(conditions, rows, size, 1.0))
        explained = max(0.0, 1 - float(left.mean() / power.mean()))
        if explained < _EXACT:
            center, width = _revealing_levels(left)
    return Structure(
        center=center,
        width=width,
        strongest=math.sqrt(power.max()),
        num_images=count,
        explained=explained,
    )


def _waves(dataset: ImageDataset, rows: np.ndarray, size: tuple[int, ...], sigma_data: float) -> Tensor:
    """Fourier coefficients of coded images that are brought to a size, `[N, C, *size]` complex64."""
    coding = measure_coding(dataset, sample=len(rows), sigma_data=sigma_data)
    parts = []
    for some in np.array_split(rows, -(-len(rows) // 64)):
        coded = torch.nan_to_num(coding.encode(torch.from_numpy(dataset.images(some))))
        if coded.shape[2:] != size:
            coded = interpolate(coded, size, mode="bilinear", align_corners=False, antialias=True)
        parts.append(torch.fft.fft2(coded, norm="ortho"))
    return torch.cat(parts)


def _unexplained(waves: Tensor, given: Tensor) -> np.ndarray:
    """Variance of each coefficient that the best linear function of the condition's leaves, `[H, W, C]`."""
    x, y = (w.permute(2, 3, 0, 1) for w in (waves, given))
    left = x - y @ (torch.linalg.pinv(y.mH @ y, rtol=1e-5, hermitian=True) @ (y.mH @ x))
    count, fitted = y.shape[2:]
    found: np.ndarray = left.abs().square().double().mean(2).numpy() * (count / (count - fitted))
    return found


def _revealing_levels(power: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the ln sigma at which noise stops hiding patterns, weighted by variance."""
    power = power[power > 0]
    levels = np.log(power) / 2
    mean = float(np.average(levels, weights=power))
    spread = float(np.average((levels - mean) ** 2, weights=power))
    return mean, math.sqrt(spread + math.pi**2 / 12)  # a single pattern is revealed over a logistic density


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
