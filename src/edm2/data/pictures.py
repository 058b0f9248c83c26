"""Pictures and arrays in files, decoded to `[C, H, W]`."""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from edm2.data.npy import as_image, image_layout, read_array, read_array_header, stored_kind
from edm2.extras import needed

with needed("edm2.data"):
    from PIL import Image, UnidentifiedImageError

PICTURES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".webp", ".bmp", ".dib", ".gif",
    ".tif", ".tiff",
)  # fmt: skip
# Suffixes of pictures in formats that are not read; users are told how many there are.
OTHER_PICTURES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".psd",
    ".svg", ".ico", ".icns", ".tga", ".dds", ".exr", ".hdr", ".pcx", ".xcf", ".dcm", ".nii", ".fits", ".raw", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
)  # fmt: skip
# Pillow refuses pictures of more than twice its limit; its warning before that would disturb users of large ones.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
ARRAY = "array"
# Errors of reading a file and the image in it.
UNREADABLE = (OSError, ValueError)
# Pillow knows dozens more formats, some of which run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
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
    """Properties of an image, known before its pixels are read.

    Attributes:
        mode: L, LA, RGB or RGBA; F for a picture of one 16-bit or float band; "array" for .npy.
        height: Height in pixels, upright.
        width: Width in pixels, upright.
        channels: Number of channels of the mode, or of the array.
        dtype: "uint8" or "float32".
        notes: What reading changes, in a few words each.
    """

    mode: str
    height: int
    width: int
    channels: int
    dtype: str
    notes: tuple[str, ...] = ()

    def words(self) -> str:
        """Describe the image for messages."""
        channels = f"{self.channels} channel" + ("" if self.channels == 1 else "s")
        return f"{self.height}x{self.width} (height x width) with {channels}, {self.dtype}"


def is_image(name: str) -> bool:
    """Whether a file is a picture or an array by its name."""
    return name.lower().endswith((*PICTURES, ".npy"))


def encoded(image: np.ndarray, suffix: str) -> bytes:
    """An image, `[C, H, W]`, as the content of a file: `.png` of bytes, or `.npy`."""
    file = io.BytesIO()
    if suffix == ".png":
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    else:
        np.save(file, np.ascontiguousarray(image), allow_pickle=False)
    return file.getvalue()


def common_mode(modes: Iterable[str]) -> str:
    """The mode in which pictures of several modes are read.

    Args:
        modes: L, LA, RGB or RGBA, as in `Header`.

    Returns:
        The mode itself if there is only one; L for gray with and without alpha; otherwise RGB.
    """
    found = set(modes)
    if len(found) == 1:
        return found.pop()
    return "L" if found <= {"L", "LA"} else "RGB"


@contextmanager
def refusing() -> Iterator[None]:
    """Turn all errors of Pillow, NumPy and zipfile about bad bytes into a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except MemoryError as error:
        raise ValueError("there is not enough memory for it") from error
    except UnidentifiedImageError as error:
        raise ValueError("cannot identify it as PNG, JPEG, WebP, BMP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million pixels, the limit that keeps "
            "small files from filling the memory: scale it down or cut it into tiles first, or in Python raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@refusing()
def read_header(name: str, data: bytes, *, size: int | None = None) -> Header:
    """Read the header of an image.

    Args:
        name: Name of the file; `.npy` is an array, any other a picture.
        data: The file, or as much of its beginning as holds its header.
        size: Size of the whole file in bytes, which an array's values cannot exceed; default: not checked.

    Raises:
        ValueError: If the bytes are not such a file, or too few.
    """
    if name.lower().endswith(".npy"):
        shape, dtype = read_array_header(data, size)
        (channels, height, width), _ = image_layout(shape)
        return Header(ARRAY, height, width, channels, stored_kind(dtype))
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        mode, notes = _mode(image), []
        pages = getattr(image, "n_frames", 1)  # Pillow 12 does not declare it
        if image.format == "TIFF" and pages > 1:
            raise ValueError(f"it has {pages} pages: save bands as one .npy [C, H, W]")
        orientation = _orientation(image)
        if orientation is None:
            notes.append("unreadable EXIF data is ignored")
        if orientation in _TURNS:
            notes.append("turned upright as EXIF says")
        if image.mode != mode and mode != "F":
            notes.append(f"{_mode_words(image)} read as {mode}")
        if mode == "F" and "transparency" in image.info:
            notes.append("transparency of 16-bit gray is ignored")
        if ";16" in _stored_as(image) and mode != "F":
            notes.append("16-bit colour read with 8 bits")
        turned = orientation in _TURNS and orientation >= 5
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return Header(
            mode, height, width, _CHANNELS[mode], "float32" if mode == "F" else "uint8", tuple(notes)
        )


_MODE_NAMES = {"1": "black and white", "P": "palette", "L": "gray"}


def needs_whole(head: bytes) -> bool:
    """Whether a file's header may lie at its end (TIFF, WebP), so that its beginning would mislead."""
    return head[:2] in (b"II", b"MM") or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


@refusing()
def decode(
    name: str, data: bytes, mode: str | None = None, background: str = "white", *, missing: bool = False
) -> np.ndarray:
    """Read a whole image.

    Args:
        name: Name of the file; `.npy` is an array, any other a picture.
        data: The file.
        mode: Mode to which a picture is converted, L, LA, RGB or RGBA: gray is repeated, transparent parts are laid
            on the background, colour becomes luma. Default: as stored.
        background: Name or hexadecimal code of the background's colour.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Returns:
        `[C, H, W]` uint8 or float32.

    Raises:
        ValueError: If the bytes are damaged, values are not finite, or float32 would round whole numbers.
    """
    if name.lower().endswith(".npy"):
        return as_image(read_array(data), missing=missing)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
        turn, own, depth = _TURNS.get(_orientation(opened) or 1), _mode(opened), _stored_as(opened)
        # NumPy would take an AttributeError of the decoder to mean that the object is not an array.
        opened.load()
        image: Image.Image = opened
        if own != "F":
            image = _converted(_with_alpha(opened, own, depth), mode or own, background)
        if turn is not None:
            image = image.transpose(turn)
        pixels = np.asarray(image)
    if own == "F":
        values = pixels.astype(np.float32)
        if pixels.dtype.kind in "iu" and not np.array_equal(values.astype(np.float64), pixels):
            raise ValueError(
                "it holds whole numbers above 2^24, which float32 would round: save them as a float .npy"
            )
        return as_image(values, missing=missing)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _converted(image: Image.Image, mode: str, background: str) -> Image.Image:
    if mode in ("L", "RGB") and image.mode in ("LA", "RGBA"):
        below = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(below, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _mode(image: Image.Image) -> str:
    # A palette is a way of storing RGB, with or without transparency.
    if image.mode == "P":
        return "RGBA" if "transparency" in image.info else "RGB"
    mode = "F" if image.mode.startswith("I;16") else _SAME_AS.get(image.mode, image.mode)
    if mode not in _CHANNELS:
        raise ValueError(f"its mode is {image.mode!r}: convert it to gray or RGB, or to a float .npy")
    # A PNG may name one gray or colour that is transparent.
    return mode + "A" if mode in ("L", "RGB") and "transparency" in image.info else mode


def _with_alpha(image: Image.Image, mode: str, depth: str) -> Image.Image:
    # A PNG's transparent value counts in its own depth, Pillow's pixels in 8 bits.
    if image.mode == "RGB" and mode == "RGBA" and ";16" in depth:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    elif image.mode == "L" and mode == "LA" and depth in _GRAY_STEPS:
        image.info["transparency"] *= _GRAY_STEPS[depth]
    return image if image.mode == mode else image.convert(mode)


_GRAY_STEPS = {"L;2": 85, "L;4": 17}


def _stored_as(image: Image.Image) -> str:
    # Pillow's name for how pixels lie in the file, such as RGB;16B.
    tiles = getattr(image, "tile", None)
    layout = tiles[0][3] if tiles else ""
    return layout if isinstance(layout, str) else ""


def _mode_words(image: Image.Image) -> str:
    words = _MODE_NAMES.get(image.mode, image.mode)
    return (
        f"{words} with a transparent value"
        if image.mode in ("1", "L", "RGB") and "transparency" in image.info
        else words
    )


def _orientation(image: Image.Image) -> int | None:
    # 1 to 8, or None where EXIF data cannot be read; other values mean nothing, and viewers ignore them.
    # Pillow turns TIFF by itself; in PNG, EXIF data may follow the pixels, and asking would decode them.
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return None
    return value if type(value) is int and value in _TURNS else 1
