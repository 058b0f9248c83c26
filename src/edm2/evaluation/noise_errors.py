"""A network's error at each noise level, and its own estimate of it."""

import math
from typing import Any

import numpy as np
import torch

from edm2.data import Batch
from edm2.generate import ImageGenerator
from edm2.nn import keyed_normal
from edm2.train.inputs import code_batch

_NOISE_LEVELS = 25


def errors_by_noise(
    generator: ImageGenerator,
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    conditions: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measure a network's error at each noise level, and its own estimate of it.

    Args:
        generator: A model with its coding.
        images: As stored in the data set, `[N, C, H, W]`.
        labels: `[N]` classes or `[N, D]` vectors; None for an unconditional model.
        conditions: Images given with them, in the units of the training data.
        vectors: Vectors given with them, likewise.

    Returns:
        Noise levels, the learned uncertainty u (0 in config A), and the log of the weighted error measured on the
        images.
    """
    levels = torch.logspace(math.log10(0.002), math.log10(80), _NOISE_LEVELS)
    denoiser, coding, measured = generator.denoiser, generator.coding, []
    device = next(denoiser.parameters()).device
    arrays = (images, labels, conditions, vectors)
    stored: list[Any] = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    batch = Batch(0, *stored)
    with torch.no_grad():
        inputs = code_batch(batch, coding, seed=0, num_images=0, device=device)
        clean, denoise = inputs.images, denoiser.given(inputs.condition)
        counts = torch.ones_like(clean, dtype=torch.bool) if inputs.mask is None else inputs.mask
        noise = keyed_normal(inputs.index, clean.shape[1:], seed=1)
        sigmas = levels.to(device)
        learned = denoiser.logvar(sigmas).flatten()
        for sigma in sigmas:
            weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
            denoised = denoise(clean + sigma * noise, sigma.expand(len(clean)), inputs.labels)
            measured.append(float(torch.log(weight * (denoised - clean)[counts].square().mean())))
    return levels.numpy(), learned.cpu().numpy(), np.array(measured)


def noise_density(sigmas: np.ndarray, *, p_mean: float, p_std: float) -> np.ndarray:
    """Density of the training noise over ln(sigma), up to a factor."""
    density: np.ndarray = np.exp(-0.5 * ((np.log(sigmas) - p_mean) / p_std) ** 2)
    return density
