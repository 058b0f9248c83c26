"""Resizing of images."""

import numpy as np
from PIL import Image

_MAX_PIXELS = 1 << 28


def crop_centre(
    image: np.ndarray, size: tuple[int, int], *, alpha: bool = False, lanczos: bool = False
) -> np.ndarray:
    """Scale an image until it just covers a size, and cut out its centre.

    The image is halved with a box filter while both sides stay at least as long as the size, then scaled bicubically;
    or, with Lanczos, scaled once.
    ImageNet was prepared for EDM2 in this way. Smaller images are enlarged.

    Args:
        image: `[C, H, W]` uint8 or float32.
        size: New height and width in pixels.
        alpha: Whether the last channel is opacity, which weights the others.
        lanczos: Whether to scale with Lanczos' filter.

    Returns:
        `[C, *size]` of the same type.

    Raises:
        ValueError: If a very long image would become too large before the crop.

    Ref: Dhariwal and Nichol, arXiv 2105.05233, whose crop of ImageNet EDM2 uses.
    """
    height, width = image.shape[1:]
    while not lanczos and height >= 2 * size[0] and width >= 2 * size[1]:
        height, width = height // 2, width // 2
        image = _scaled(image, (height, width), Image.Resampling.BOX, alpha)
    scale = max(size[0] / height, size[1] / width)
    height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if height * width > _MAX_PIXELS:
        raise ValueError(
            f"its sides are too unequal: covering {size[0]}x{size[1]} makes it {height}x{width} before the "
            "crop; cut it first, or use the method resize"
        )
    image = _scaled(image, (height, width), _filter(lanczos), alpha)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def crop_wide(
    image: np.ndarray, size: tuple[int, int], *, alpha: bool = False, lanczos: bool = False
) -> np.ndarray:
    """Crop as `crop_centre` does, and put the result in the middle of a black square of the longer side."""
    side = max(size)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    margins = ((0, 0), (top, side - size[0] - top), (left, side - size[1] - left))
    return np.pad(crop_centre(image, size, alpha=alpha, lanczos=lanczos), margins)


def stretch(
    image: np.ndarray, size: tuple[int, int], *, alpha: bool = False, lanczos: bool = False
) -> np.ndarray:
    """Scale an image to a size, without keeping its proportions; arguments as in `crop_centre`."""
    return _scaled(image, size, _filter(lanczos), alpha)


def _filter(lanczos: bool) -> Image.Resampling:
    return Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC


def _scaled(image: np.ndarray, size: tuple[int, int], method: Image.Resampling, alpha: bool) -> np.ndarray:
    if image.shape[1:] == size:
        return image
    extent = (size[1], size[0])
    if alpha:
        # Pillow weights colours by their opacity, so that those of transparent parts do not bleed.
        return np.moveaxis(
            np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize(extent, method)), -1, 0
        )
    # Channel by channel, because Pillow has no images with five bands or several float bands.
    return np.stack([np.asarray(Image.fromarray(channel).resize(extent, method)) for channel in image])
