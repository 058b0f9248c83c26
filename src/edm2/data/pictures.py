"""From the bytes of one file to an array `[C, H, W]`."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ARRAY = "array"
# What Pillow and NumPy are known to raise on bytes that are not an image.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "F": 1}
_SAME_AS = {
    "1": "L", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "I": "F",
}  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """What is known of an image before its pixels are read.

    Attributes:
        mode: L, LA, RGB or RGBA; F for a picture of one 16-bit or float band; "array" for .npy.
        height: in pixels, upright.
        width: likewise.
        channels: of the mode, or of the array.
        dtype: "uint8" or "float32".
        notes: what reading changes, a few words each.
    """

    mode: str
    height: int
    width: int
    channels: int
    dtype: str
    notes: tuple[str, ...] = ()

    def words(self) -> str:
        """For messages."""
        return f"{self.height}x{self.width} (height x width) with {self.channels} channels, {self.dtype}"


def is_image(name: str) -> bool:
    """Whether a file's name is that of a picture or an array."""
    return name.lower().endswith((*PICTURES, ".npy"))


def common_mode(modes: Iterable[str]) -> str:
    """The mode in which pictures of several modes are read.

    Args:
        modes: L, LA, RGB or RGBA, as in `Header`.

    Returns:
        The mode itself where there is one; L for gray with and without alpha; else RGB.
    """
    found = set(modes)
    if len(found) == 1:
        return found.pop()
    return "L" if found <= {"L", "LA"} else "RGB"


def read_header(name: str, data: bytes) -> Header:
    """Read what `Header` holds.

    Args:
        name: of the file; `.npy` is an array, all else a picture.
        data: the file, or as much of its beginning as holds its header.

    Raises:
        Exception: one of `UNREADABLE`, where the bytes are no such file, or too few.
    """
    if name.lower().endswith(".npy"):
        shape, dtype = _array_header(data)
        (channels, height, width), _ = _image_shape(shape)
        return Header(ARRAY, height, width, channels, _kind(dtype))
    with Image.open(io.BytesIO(data)) as image:
        mode, notes = _mode(image), []
        pages = getattr(image, "n_frames", 1)
        if image.format == "TIFF" and pages > 1:
            raise ValueError(f"it has {pages} pages: save bands as one .npy [C, H, W]")
        orientation = _orientation(image)
        if orientation in _TURNS:
            notes.append("turned upright as EXIF says")
        if image.mode != mode and mode != "F":
            notes.append(f"{_MODE_NAMES.get(image.mode, image.mode)} read as {mode}")
        if image.tile and isinstance(image.tile[0][3], str) and ";16" in image.tile[0][3] and mode != "F":
            notes.append("16-bit colour read with 8 bits")
        height, width = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
        return Header(
            mode, height, width, _CHANNELS[mode], "float32" if mode == "F" else "uint8", tuple(notes)
        )


_MODE_NAMES = {"1": "black and white", "P": "palette"}


def decode(name: str, data: bytes, mode: str | None = None) -> np.ndarray:
    """Read a whole image.

    Args:
        name: of the file; `.npy` is an array, all else a picture.
        data: the file.
        mode: L, LA, RGB or RGBA, to which a picture is converted: gray is repeated, transparent parts are laid
            on white, colour becomes its luma. Default: as stored.

    Returns:
        `[C, H, W]` uint8 or float32.

    Raises:
        Exception: one of `UNREADABLE`, for damaged bytes; ValueError, for values that are not finite.
    """
    if name.lower().endswith(".npy"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return as_image(array)
    with Image.open(io.BytesIO(data)) as opened:
        turn, own = _TURNS.get(_orientation(opened)), _mode(opened)
        image: Image.Image = opened
        if own != "F":
            image = _converted(opened.convert(own), mode or own)
        if turn is not None:
            image = image.transpose(turn)
        pixels = np.asarray(image)
    if own == "F":
        return as_image(pixels.astype(np.float32))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def as_image(array: np.ndarray) -> np.ndarray:
    """An array as `[C, H, W]` uint8 or float32; see `image_layout`.

    Raises:
        ValueError: for another shape or type, or values that are not finite.
    """
    shape, last = _image_shape(array.shape)
    array = array.transpose(2, 0, 1) if last else array.reshape(shape)
    image = as_stored(array)
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise ValueError("it holds values that are not finite")
    return image


def as_stored(array: np.ndarray) -> np.ndarray:
    """Values as uint8 or float32: bytes as they are, True as 255, other numbers with their own values."""
    kind = _kind(array.dtype)
    return array * np.uint8(255) if array.dtype == bool else array.astype(kind, copy=False)


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether an image's three axes are height, width, channels.

    They are where the last is at most 4 and smaller than the two others.
    """
    return len(shape) == 3 and shape[2] <= 4 and shape[2] < min(shape[:2])


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode in ("L", "RGB") and image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _mode(image: Image.Image) -> str:
    # A palette is a way of storing RGB, with or without transparency.
    if image.mode == "P":
        return "RGBA" if "transparency" in image.info else "RGB"
    mode = "F" if image.mode.startswith("I;16") else _SAME_AS.get(image.mode, image.mode)
    if mode not in _CHANNELS:
        raise ValueError(f"its mode is {image.mode!r}: convert it to gray or RGB, or to a float .npy")
    return mode


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFF by itself; in PNG, EXIF data may follow the pixels, and asking would decode them.
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _array_header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its .npy format is version {version}: write it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _image_shape(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    # As channels, height, width; and whether the channels come last in the array.
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"its array has the shape {list(shape)}, but must have [C, H, W], [H, W, C] with C up to 4, or [H, W]"
        )
    if channels_last(shape):
        return (shape[2], shape[0], shape[1]), True
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return (channels, height, width), False


def _kind(dtype: np.dtype) -> str:
    if dtype in (np.uint8, np.bool_):
        return "uint8"
    # Integers of more than 24 bits would be rounded.
    if dtype.kind == "f" or (dtype.kind in "iu" and dtype.itemsize <= 2):
        return "float32"
    raise ValueError(f"its array has the type {dtype}, but must be bool, float, or integers of 8 or 16 bits")
