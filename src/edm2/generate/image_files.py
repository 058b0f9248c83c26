"""One file a sample: PNG for pictures, `.npy` for other data."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edm2.data.npy import read_array
from edm2.data.pictures import encoded
from edm2.files import write_atomic

PNG_CHANNELS = (1, 3, 4)
"""Channels that a PNG holds: gray, RGB, RGBA."""


def missing_files(files: Sequence[Path], *, warn: bool) -> list[int]:
    """Which files are missing or damaged, as other programs and full disks leave them.

    Args:
        files: What to look at.
        warn: Whether to say that some are damaged.

    Returns:
        Their positions, in order.
    """
    missing, damaged = [], []
    for i, file in enumerate(files):
        if not file.exists():
            missing.append(i)
        elif not _is_whole(file):
            damaged.append(i)
    if damaged and warn:
        warnings.warn(
            f"{len(damaged)} files are damaged and will be made again, such as {files[damaged[0]]}",
            stacklevel=4,
        )
    return sorted(missing + damaged)


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".npy":
            read_array(path.read_bytes())
            return True
        with Image.open(path) as image:
            image.verify()  # checksums of all parts, which takes less than decoding them
    # Pillow reports a broken PNG as a SyntaxError.
    except (OSError, ValueError, EOFError, SyntaxError):
        return False
    return True


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image `[C, H, W]` to a file whose suffix says how."""
    write_atomic(path, encoded(image, path.suffix))


def read_image(path: Path) -> np.ndarray:
    """An image as `[C, H, W]`."""
    if path.suffix == ".npy":
        return read_array(path.read_bytes())
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """PNG files of one size as an array, `[N, C, H, W]` uint8."""
    return np.stack([read_image(path) for path in paths])
