"""Latents of images: what a latent diffusion model is trained on.

Ref: docs/data.md.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edm2.data.autoencoder import (
    LatentDecoder,
    PixelRange,
    autoencoder_digest,
    check_pixel_range,
    encode_images,
)
from edm2.data.dataset import ImageDataset
from edm2.data.pictures import encoded
from edm2.data.prepare.chunks import Chunk, Made, added_up, begin, image_name, write_chunk
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
    means: bool = False,
    quiet: bool = False,
) -> Encoded:
    """Write a data set's latents: for each image the means, then the standard deviations, `[2 C, H, W]` float32.

    The same call continues interrupted work, and finds finished work done. Labels and vectors are kept.

    Args:
        dataset: Images of bytes with as many channels as the autoencoder takes.
        dest: New folder, or a file name that ends in `.zip`.
        autoencoder: From `edm2.data.autoencoder.load_autoencoder`.
        batch_size: Images at a time.
        pixel_range: Values of black and white at the autoencoder's input: "zero-one" as for the models released with
            EDM2; "minus-one-one" as most autoencoders were trained.
        means: Whether to write the means alone, `[C, H, W]`, as for conditions.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If images do not fit the autoencoder, the destination exists, another process is writing it, or
            latents are not finite.
    """
    check_encodable(dataset, autoencoder, batch_size, pixel_range)
    settings: dict[str, Any] = {"pixel_range": pixel_range, "batch_size": batch_size}
    if means:
        settings["means"] = True

    def files(stored: Tensor) -> tuple[Iterator[bytes], dict[str, Any]]:
        values = encode_images(autoencoder, stored, pixel_range)
        if not torch.isfinite(values).all():
            raise ValueError("the autoencoder gave latents that are not finite: use --dtype float32")
        mean, std = values.double().chunk(2, dim=1)
        # The moments of the training samples, mean + std n.
        square = mean.square() if means else mean.square() + std.square()
        sums = {
            "values": mean.numel() // mean.shape[1],
            "mean": mean.sum((0, 2, 3)).tolist(),
            "square": square.sum((0, 2, 3)).tolist(),
        }
        kept = values[:, : mean.shape[1]] if means else values
        return (encoded(image, ".npy") for image in kept.numpy()), sums

    made = _make(
        dataset, dest, autoencoder, files, settings, batch_size, suffix=".npy", what="encoding", quiet=quiet
    )
    mean, square = (np.array(made.sums[key]) / made.sums["values"] for key in ("mean", "square"))
    std = np.sqrt(square - mean**2)
    return Encoded(made.path, made.num_images, tuple(mean.tolist()), tuple(std.tolist()))


def decode_latents(
    dataset: ImageDataset,
    dest: str | Path,
    autoencoder: Any,
    *,
    batch_size: int = 8,
    pixel_range: PixelRange = "zero-one",
    quiet: bool = False,
) -> Made:
    """Write the pictures of latents as PNG, the inverse of `encode_latents`; labels and vectors are kept.

    Args:
        dataset: Latents: as many channels as the autoencoder's, or twice as many, means and standard deviations, of
            which the means are decoded.
        dest: New folder, or a file name that ends in `.zip`.
        autoencoder: From `edm2.data.autoencoder.load_autoencoder`.
        batch_size: Latents at a time.
        pixel_range: Values of black and white at the autoencoder's output.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If latents do not fit the autoencoder, the destination exists, or another process is writing it.
    """
    decoder = LatentDecoder(autoencoder, pixel_range=pixel_range, batch_size=batch_size)
    channels, (stored, *_) = decoder.latent_channels, dataset.image_shape
    if dataset.dtype == np.uint8 or stored not in (channels, 2 * channels):
        raise ValueError(
            f"{dataset.name!r} has {stored} channels of {dataset.dtype}, the autoencoder decodes {channels} of "
            f"float32, or {2 * channels} with standard deviations: name the autoencoder that encoded them"
        )

    def files(latents: Tensor) -> tuple[Iterator[bytes], dict[str, Any]]:
        return (encoded(image, ".png") for image in decoder(latents[:, :channels]).numpy()), {}

    settings = {"pixel_range": pixel_range, "batch_size": batch_size, "decoded": True}
    return _make(
        dataset, dest, autoencoder, files, settings, batch_size, suffix=".png", what="decoding", quiet=quiet
    )


def _make(
    dataset: ImageDataset,
    dest: str | Path,
    autoencoder: Any,
    files: Callable[[Tensor], tuple[Iterator[bytes], dict[str, Any]]],
    settings: dict[str, Any],
    batch_size: int,
    *,
    suffix: str,
    what: str,
    quiet: bool,
) -> Made:
    """Write a file for each image, from batches as they are stored, in chunks that survive interruptions."""
    settings = {
        "fingerprint of the images": dataset.fingerprint,
        "classes": list(dataset.class_names),
        "autoencoder": autoencoder_digest(autoencoder),
        **settings,
        "chunk": _CHUNK_IMAGES,
    }
    starts = range(0, len(dataset), _CHUNK_IMAGES)

    def chunk_from(start: int) -> Chunk:
        chunk, stop = Chunk(), min(start + _CHUNK_IMAGES, len(dataset))
        sums = []
        for first in range(start, stop, batch_size):
            rows = np.arange(first, min(first + batch_size, stop))
            made, added = files(torch.from_numpy(dataset.images(rows)))
            chunk.files |= {image_name(int(row), suffix): data for row, data in zip(rows, made, strict=True)}
            chunk.labels += dataset.labels(rows).tolist() if dataset.num_classes else [-1] * len(rows)
            sums.append(added)
        chunk.sums = added_up(sums)
        return chunk

    with begin(Path(dest), settings) as folder:
        if (done := folder.finished()) is not None:
            return done
        with Progress(what, len(dataset), "images", quiet=quiet) as progress:
            for number, start in enumerate(starts):
                if not folder.is_done(number):
                    write_chunk(folder.path(number), chunk_from(start))
                progress.advance(min(_CHUNK_IMAGES, len(dataset) - start))
        vectors = None
        if dataset.vector_dim:
            rows = np.arange(len(dataset))
            vectors = {image_name(row, suffix): v for row, v in enumerate(dataset.vectors(rows))}
        return folder.pack(len(starts), dataset.class_names, vectors)


def check_encodable(
    dataset: ImageDataset, autoencoder: Any, batch_size: int = 1, pixel_range: str = "zero-one"
) -> None:
    """Raise ValueError unless `encode_latents` takes these arguments."""
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
