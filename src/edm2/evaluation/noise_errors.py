"""A network's error at each noise level, and its own estimate of it."""

import math

import numpy as np
import torch

from edm2.generate import ImageGenerator
from edm2.nn import keyed_normal

_NOISE_LEVELS = 25


def errors_by_noise(
    generator: ImageGenerator, images: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measure a network's error at each noise level, and its own estimate of it.

    Args:
        generator: A model with its coding.
        images: As stored in the data set, `[N, C, H, W]`.
        labels: `[N]` classes or `[N, D]` vectors; None for an unconditional model.

    Returns:
        Noise levels, the learned uncertainty u (0 in config A), and the log of the weighted error measured on the
        images.
    """
    sigmas = torch.logspace(math.log10(0.002), math.log10(80), _NOISE_LEVELS)
    index = torch.arange(len(images))
    classes = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels))
    denoiser, measured = generator.denoiser, []
    with torch.no_grad():
        clean = generator.coding.encode(torch.from_numpy(images), index, seed=0)
        noise = keyed_normal(index, clean.shape[1:], seed=1)
        learned = denoiser.logvar(sigmas).flatten()
        for sigma in sigmas:
            weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
            denoised = denoiser(clean + sigma * noise, sigma.expand(len(clean)), classes)
            measured.append(float(torch.log(weight * (denoised - clean).square().mean())))
    return sigmas.numpy(), learned.numpy(), np.array(measured)


def noise_density(sigmas: np.ndarray, *, p_mean: float, p_std: float) -> np.ndarray:
    """Density of the training noise over ln(sigma), up to a factor."""
    density: np.ndarray = np.exp(-0.5 * ((np.log(sigmas) - p_mean) / p_std) ** 2)
    return density
