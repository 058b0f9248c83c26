import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from edm2.data.pictures import as_image, channels_last, common_mode, decode, read_header

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png_of_16_bits(pixels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def agree(name, data):
    """What is said before reading is what is read."""
    header, image = read_header(name, data), decode(name, data)
    assert image.shape == (header.channels, header.height, header.width)
    assert image.dtype.name == header.dtype
    return header, image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    header, image = agree("a", data)
    assert np.array_equal(image, expected)
    assert image.shape == ((3, 5, 7) if orientation >= 5 else (3, 7, 5))
    assert (header.notes == ("turned upright as EXIF says",)) == (orientation > 1 and kind != "TIFF")


@pytest.mark.parametrize("values", [np.uint16([[0, 1], [256, 65535]]), np.float32([[0, -1.5], [1e-3, 7e8]])])
def test_one_band_of_16_bits_or_floats_keeps_its_values(values):
    kind = "PNG" if values.dtype == np.uint16 else "TIFF"
    header, image = agree("a", encoded(Image.fromarray(values), kind))
    assert header.mode == "F"
    assert np.array_equal(image[0], values.astype(np.float32))


def test_16_bit_colour_keeps_its_upper_bytes_and_says_so():
    pixels = RNG.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    header, image = agree("a.png", png_of_16_bits(pixels))
    assert np.array_equal(image, (pixels >> 8).transpose(2, 0, 1))
    assert header.notes == ("16-bit colour read with 8 bits",)


@pytest.mark.parametrize(
    ("mode", "read", "note"),
    [
        ("P", "RGB", "palette read as RGB"),
        ("1", "L", "black and white read as L"),
        ("CMYK", "RGB", "CMYK read as RGB"),
    ],
)
def test_other_modes_are_read_as_a_viewer_shows_them(mode, read, note):
    source = Image.fromarray(PIXELS).convert(mode)
    header, image = agree("a", encoded(source, "TIFF" if mode == "CMYK" else "PNG"))
    expected = np.atleast_3d(np.asarray(source.convert(read))).transpose(2, 0, 1)
    assert np.array_equal(image, expected)
    assert header.notes == (note,)


def test_transparency_of_a_palette_is_kept():
    palette = Image.fromarray(PIXELS).quantize(4)
    header, image = agree("a", encoded(palette, transparency=0))
    assert header.mode == "RGBA"
    assert np.array_equal(image[3] == 0, np.asarray(palette) == 0)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("L", (4, 4), color) for color in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (agree("a.gif", data)[1] == 10).all()


def test_pages_are_not_guessed_to_be_bands():
    pages = [Image.new("F", (4, 4), color) for color in (1.0, 2.0)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"it has 2 pages: save bands as one .npy \[C, H, W\]"):
        read_header("a.tif", data)


def test_a_mode_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="its mode is 'LAB': convert it to gray or RGB"):
        read_header("a.tif", encoded(Image.new("LAB", (4, 4)), "TIFF"))


@pytest.mark.parametrize(
    ("modes", "common"),
    [("L", "L"), ("RGBA", "RGBA"), ("L LA", "L"), ("L RGB", "RGB"), ("RGB RGBA", "RGB"), ("LA RGBA", "RGB")],
)
def test_common_mode(modes, common):
    assert common_mode(modes.split()) == common


def test_gray_with_alpha_on_white():
    data = encoded(Image.fromarray(np.uint8([[[0, 255], [0, 0], [100, 255]]])))
    assert decode("a", data, "L").tolist() == [[[0, 255, 100]]]
    assert decode("a", data, "RGB").tolist() == [[[0, 255, 100]]] * 3


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i2", ">u2", "i1"])
def test_numbers_keep_their_values(dtype):
    array = np.array([[[3, 100], [0, 7]]] * 5).astype(dtype)
    _, image = agree("a.npy", npy(array))
    assert image.dtype == np.float32
    assert np.array_equal(image, array)


def test_truth_values_are_black_and_white():
    assert agree("a.npy", npy(np.array([[True, False]])))[1].tolist() == [[[255, 0]]]


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((7, 5, 3), True),
        ((7, 5, 1), True),
        ((3, 7, 5), False),
        ((13, 7, 5), False),
        ((4, 4, 4), False),
        ((9, 9), False),
    ],
)
def test_channels_first_or_last(shape, last):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    assert channels_last(shape) is last
    expected = array.transpose(2, 0, 1) if last else array[None] if len(shape) == 2 else array
    assert np.array_equal(agree("a.npy", npy(array))[1], expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"shape \[3\], but must have \[C, H, W\], \[H, W, C\] with C up to 4, or \[H, W\]"),
        (np.zeros((0, 3, 3)), "shape"),
        (np.zeros((2, 2), np.int64), "type int64, but must be bool, float, or integers of 8 or 16 bits"),
        (np.full((2, 2), np.nan), "values that are not finite"),
    ],
)
def test_errors_of_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        as_image(array)


def test_a_future_version_of_npy():
    data = npy(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"its .npy format is version \(3, 0\): write it with numpy.save"):
        read_header("a.npy", data[:6] + b"\3" + data[7:])
