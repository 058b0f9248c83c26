"""Images on a grid, pixel for pixel."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edm2.extras import needed
from edm2.files import write_atomic

with needed("edm2.report"):
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

_TILE = 64  # least width or height of an image on a grid of classes, to which its pixels are repeated
_MOST_COLUMNS, _MOST_NAMED, _NAME_SIZE = 32, 16, 12


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


def case_grid(rows: Sequence[tuple[np.ndarray, np.ndarray]], *, tile: int = 64) -> PIL.Image.Image:
    """Lay out images of the same cases, such as condition, sample and truth: a row for each kind, a column a case.

    Pictures of 1 or 3 channels of bytes are drawn as they are. Fields get a colour map, their channels side by side;
    missing values are grey.

    Args:
        rows: Images of each kind, `[N, C, H, W]`, with the images whose range each channel's colours span, so that
            samples and truth can share theirs.
        tile: Least width or height of a channel on the grid.

    Returns:
        A picture of mode RGBA; the rows may be of different sizes.
    """
    drawn = []
    for images, like in rows:
        scale = max(1, -(-tile // max(images.shape[-2:])))
        drawn.append(image_grid(coloured(images, like), columns=len(images), scale=scale))
    return stacked(drawn, gap=4)


def stacked(pictures: Sequence[PIL.Image.Image], *, gap: int) -> PIL.Image.Image:
    """Pictures under each other, with transparent gaps in pixels, as one of mode RGBA."""
    size = (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap)
    whole, top = PIL.Image.new("RGBA", size), 0
    for picture in pictures:
        whole.paste(picture.convert("RGBA"), (0, top))
        top += picture.height + gap
    return whole


def coloured(images: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Images as pictures: bytes as RGB, fields in a colour map with their channels side by side.

    Args:
        images: `[N, C, H, W]`; missing values, which are NaN, become grey.
        like: Images whose range each channel's colours span.

    Returns:
        `[N, 3, H, W']` uint8.
    """
    if images.dtype == np.uint8:
        known = images if images.shape[1] in (1, 3) else images[:, :1]
        return np.repeat(known, 3, axis=1) if known.shape[1] == 1 else known
    from matplotlib import colormaps

    low = np.nanmin(like, axis=(0, 2, 3), keepdims=True)
    high = np.nanmax(like, axis=(0, 2, 3), keepdims=True)
    shares = (images - low) / np.maximum(high - low, 1e-12)
    strips = np.concatenate(list(shares.transpose(1, 0, 2, 3)), axis=-1)  # [N, H, C * W]
    colours = colormaps["viridis"](np.nan_to_num(strips))[..., :3]
    colours[np.isnan(strips)] = 0.5
    made: np.ndarray = np.round(255 * colours).astype(np.uint8).transpose(0, 3, 1, 2)
    return made


def class_grid(images: np.ndarray, classes: int = 0, names: Sequence[str] = ()) -> PIL.Image.Image:
    """Lay out images large enough to see; those of classes in turn with a column for each, its name above.

    Args:
        images: uint8 [N, C, H, W]; image i is of class i modulo the number of classes.
        classes: Number of classes; with fewer than 2 or more than 32, the grid is square.
        names: Name of each class; drawn for up to 16.

    Returns:
        A picture as `image_grid` makes it, with a line for the names.
    """
    scale = max(1, -(-_TILE // max(images.shape[-2:])))
    if not 2 <= classes <= _MOST_COLUMNS or len(images) < classes:
        return image_grid(images, columns=max(1, round(len(images) ** 0.5)), scale=scale)
    grid = image_grid(images, columns=classes, scale=scale)
    if len(names) != classes or classes > _MOST_NAMED:
        return grid
    step = (grid.width + scale) // classes
    font = PIL.ImageFont.load_default(_NAME_SIZE)
    upright = all(font.getlength(name) < step - 2 for name in names)
    height = _NAME_SIZE + 6 if upright else round(max(font.getlength(name) for name in names)) + 8
    strip = PIL.Image.new("L", (grid.width, height))
    draw = PIL.ImageDraw.Draw(strip)
    for i, name in enumerate(names):
        middle = i * step + (step - scale) // 2
        if upright:
            draw.text((middle, height // 2), name, fill=255, font=font, anchor="mm")
            continue
        tall = PIL.Image.new("L", (height, _NAME_SIZE + 4))
        PIL.ImageDraw.Draw(tall).text((2, tall.height // 2), name, fill=255, font=font, anchor="lm")
        strip.paste(tall.rotate(90, expand=True), (middle - tall.height // 2, 0))
    whole = PIL.Image.new(grid.mode, (grid.width, grid.height + height))
    # Mid-grey letters on nothing can be read on light and dark pages.
    ink = (128, 255) if grid.mode == "LA" else (128, 128, 128, 255)
    whole.paste(PIL.Image.new(grid.mode, strip.size, ink), (0, 0), strip)
    whole.paste(grid, (0, height))
    return whole


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
