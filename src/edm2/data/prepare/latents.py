"""Latents of images: what a latent diffusion model is trained on.

Ref: docs/data.md.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from edm2.data.autoencoder import PixelRange, autoencoder_digest, check_pixel_range, encode_images
from edm2.data.dataset import ImageDataset
from edm2.data.prepare.chunks import Chunk, begin, image_name, write_chunk
from edm2.progress import Progress

_CHUNK_IMAGES = 256


class Encoded(NamedTuple):
    """The outcome of `encode_latents`.

    Attributes:
        path: The new folder or ZIP.
        num_images: Number of images in it.
        mean: Mean of the latents' channels: the `mean` of the trainer's coding.
        std: Standard deviation of the latents' channels: the `std` of the trainer's coding.
    """

    path: Path
    num_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def encode_latents(
    dataset: ImageDataset,
    dest: str | Path,
    autoencoder: Any,
    *,
    batch_size: int = 8,
    pixel_range: PixelRange = "zero-one",
    quiet: bool = False,
) -> Encoded:
    """Write a data set's latents: for each image the means, then the standard deviations, `[2 C, H, W]` float32.

    The same call continues interrupted work, and finds finished work done.

    Args:
        dataset: Images of bytes with as many channels as the autoencoder takes.
        dest: New folder, or a file name that ends in `.zip`.
        autoencoder: From `edm2.data.autoencoder.load_autoencoder`.
        batch_size: Images at a time.
        pixel_range: Values of black and white at the autoencoder's input: "zero-one" as for the models released with
            EDM2; "minus-one-one" as most autoencoders were trained.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If images do not fit the autoencoder, the destination exists, another process is writing it, or
            latents are not finite.
    """
    _check(dataset, autoencoder, batch_size, pixel_range)
    settings = {
        "fingerprint of the images": dataset.fingerprint,
        "classes": list(dataset.class_names),
        "autoencoder": autoencoder_digest(autoencoder),
        "pixel_range": pixel_range,
        "batch_size": batch_size,
        "chunk": _CHUNK_IMAGES,
    }
    with begin(Path(dest), settings) as folder:
        made = folder.finished()
        if made is None:
            starts = range(0, len(dataset), _CHUNK_IMAGES)
            with Progress("encoding", len(dataset), "images", quiet=quiet) as progress:
                for number, start in enumerate(starts):
                    rows = np.arange(start, min(start + _CHUNK_IMAGES, len(dataset)))
                    if not folder.is_done(number):
                        chunk = _encode_chunk(dataset, autoencoder, rows, batch_size, pixel_range)
                        write_chunk(folder.path(number), chunk)
                    progress.advance(len(rows))
            made = folder.pack(len(starts), dataset.class_names)
    mean, square = (np.array(made.sums[key]) / made.sums["values"] for key in ("mean", "square"))
    std = np.sqrt(square - mean**2)
    return Encoded(made.path, made.num_images, tuple(mean.tolist()), tuple(std.tolist()))


def _encode_chunk(
    dataset: ImageDataset, autoencoder: Any, rows: np.ndarray, batch_size: int, pixel_range: PixelRange
) -> Chunk:
    chunk = Chunk()
    latents = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        latents.append(encode_images(autoencoder, torch.from_numpy(dataset.images(chosen)), pixel_range))
        labels = dataset.labels(chosen).tolist() if dataset.num_classes else [-1] * len(chosen)
        chunk.labels += labels
    values = torch.cat(latents)
    if not torch.isfinite(values).all():
        raise ValueError("the autoencoder gave latents that are not finite: use --dtype float32")
    for row, image in zip(rows, values.numpy(), strict=True):
        file = io.BytesIO()
        np.save(file, image)
        chunk.files[image_name(int(row), ".npy")] = file.getvalue()
    mean, std = values.double().chunk(2, dim=1)
    # The moments of the training samples, mean + std n.
    chunk.sums = {
        "values": mean.numel() // mean.shape[1],
        "mean": mean.sum((0, 2, 3)).tolist(),
        "square": (mean.square() + std.square()).sum((0, 2, 3)).tolist(),
    }
    return chunk


def _check(dataset: ImageDataset, autoencoder: Any, batch_size: int, pixel_range: str) -> None:
    config = autoencoder.config
    channels, height, width = dataset.image_shape
    factor = 2 ** (len(config.block_out_channels) - 1)
    if dataset.dtype != np.uint8 or channels != config.in_channels:
        raise ValueError(
            f"{dataset.name!r} has {channels} channels of {dataset.dtype}, the autoencoder takes {config.in_channels} "
            "of uint8: convert it first with 'edm2 data convert SOURCE --out NEW.zip --mode rgb'"
        )
    if height % factor or width % factor:
        raise ValueError(
            f"the images of {dataset.name!r} are {height}x{width}, the autoencoder needs multiples of {factor}: "
            "convert them first with 'edm2 data convert SOURCE --out NEW.zip --size N'"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    check_pixel_range(pixel_range)
