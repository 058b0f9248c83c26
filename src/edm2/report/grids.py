"""Images on a grid, pixel for pixel."""

import io
import os
from pathlib import Path

import numpy as np

from edm2.extras import needed
from edm2.files import write_atomic

with needed("edm2.report"):
    import PIL.Image


def image_grid(images: np.ndarray, *, columns: int, scale: int = 1, padding: int = 1) -> PIL.Image.Image:
    """Lay images out row by row.

    One channel is drawn grey, three as RGB, four as RGBA. Any other number has no colours of its own: each
    image becomes a strip of its channels, side by side in grey. The gaps and the empty cells of the last row
    are transparent, so that a grid suits light and dark pages.

    Args:
        images: uint8 [N, C, H, W].
        columns: Images per row, at least 1; fewer images make one shorter row.
        scale: Width of a pixel of the images in the grid, at least 1.
        padding: Gap between neighbours, in pixels of the images; there is none at the border.

    Returns:
        A picture of mode LA or RGBA, `scale * (cols * (W + padding) - padding)` wide and likewise high.

    Raises:
        ValueError: The images are not uint8, or not [N, C, H, W] with at least one image.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images are {images.dtype} {images.shape}: give at least one, as uint8 [N, C, H, W] from 0 to 255"
        )
    tiles = _with_opacity(images)
    count, height, width, depth = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height + padding, width + padding, depth), np.uint8)
    cells[:count, :height, :width] = tiles
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + padding), columns * (width + padding), depth)
    grid = grid[: grid.shape[0] - padding, : grid.shape[1] - padding]
    return PIL.Image.fromarray(grid.repeat(scale, axis=0).repeat(scale, axis=1))


def _with_opacity(images: np.ndarray) -> np.ndarray:
    """[N, C, H, W] to [N, H, W', 2 or 4], the last channel being opacity."""
    count, channels, height, _ = images.shape
    if channels == 4:
        return np.moveaxis(images, 1, -1)
    if channels == 3:
        tiles = images.transpose(0, 2, 3, 1)
    else:
        tiles = images.transpose(0, 2, 1, 3).reshape(count, height, -1, 1)
    opaque = np.full_like(tiles[..., :1], 255)
    return np.concatenate([tiles, opaque], axis=-1)


def png_bytes(image: PIL.Image.Image) -> bytes:
    """Encode a picture as PNG; the same picture gives the same bytes.

    Args:
        image: Any picture that PNG can hold.

    Returns:
        The bytes of the PNG file.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(image: PIL.Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture to a PNG file, whole or not at all.

    Args:
        image: Any picture that PNG can hold.
        path: The file, ending in .png; missing parent folders are created.

    Returns:
        The path written.

    Raises:
        ValueError: The name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{os.fspath(path)!r} does not end in .png: what is written is always PNG")
    return write_atomic(path, png_bytes(image))
