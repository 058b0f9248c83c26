"""Networks so small that sampling takes milliseconds."""

from pathlib import Path
from typing import Any

import torch

from edm2.data import FloatCoding, PixelCoding
from edm2.diffusion import Denoiser, build_denoiser, save_model
from edm2.generate import ImageGenerator
from edm2.train.coding import Coding

CODING = Coding(kind="pixels", values=PixelCoding(), num_channels=1)
INFO = {"coding": CODING.to_json(), "class_names": [], "data": "small", "run_id": "r", "num_images": 10}


def small_denoiser(seed: int = 0, label_dim: int = 3, channels: int = 1, **options: Any) -> Denoiser:
    settings: dict[str, Any] = dict(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), channels_per_head=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = build_denoiser(8, channels, label_dim, **{**settings, **options})
    with torch.no_grad():
        for parameter in denoiser.parameters():  # gains start at 0, which would hide most of the network
            if parameter.ndim == 0:
                parameter.fill_(0.5)
    return denoiser.eval().requires_grad_(False)


def small_generator(
    seed: int = 0, fix_weights: bool = False, coding: Coding = CODING, **options: Any
) -> ImageGenerator:
    return ImageGenerator(small_denoiser(seed, **options), coding, INFO, fix_weights=fix_weights)


def latent_coding() -> Coding:
    values = FloatCoding(mean=(5.0, 3.0), std=(4.0, 2.0))
    return Coding(kind="latents", values=values, num_channels=2)


def small_model(path: Path, seed: int = 0, **options: Any) -> Path:
    denoiser = small_denoiser(seed, **options)
    return save_model(path, denoiser.options, denoiser.state_dict(), {**INFO})
