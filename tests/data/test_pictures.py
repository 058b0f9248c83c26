import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from edm2.data import open_dataset
from edm2.data.npy import as_image, channels_last
from edm2.data.pictures import common_mode, decode, needs_whole, read_header

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


def png(width, height, depth, kind, rows, transparent=None):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    if transparent is not None:
        head += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def png_of_16_bits(pixels, transparent=None):
    height, width, _ = pixels.shape
    return png(width, height, 16, 2, [row.astype(">u2").tobytes() for row in pixels], transparent)


def npy_with_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


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


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_one_transparent_gray(depth):
    # The values 0 and the largest; the second is transparent.
    largest = 2**depth - 1
    row = bytes([0, 255]) if depth == 8 else bytes([largest << (8 - 2 * depth)])
    header, image = agree("a", png(2, 1, depth, 0, [row], (largest,)))
    assert header.mode == "LA"
    assert image[:, 0].tolist() == [[0, 255], [255, 0]]
    words = "black and white" if depth == 1 else "gray"
    assert header.notes == (f"{words} with a transparent value read as LA",)


@pytest.mark.parametrize("value", [1, 2])
def test_one_transparent_gray_between_black_and_white(value):
    image = decode("a", png(4, 1, 2, 0, [bytes([0b00011011])], (value,)))
    assert image[1, 0].tolist() == [0 if i == value else 255 for i in range(4)]


def test_one_transparent_colour():
    data = encoded(Image.fromarray(PIXELS), transparency=tuple(PIXELS[2, 3].tolist()))
    header, image = agree("a", data)
    assert header.mode == "RGBA"
    assert np.array_equal(image[3] == 0, (PIXELS[2, 3] == PIXELS).all(2))
    on_white = decode("a", data, "RGB")
    assert on_white[:, 2, 3].tolist() == [255] * 3
    pixels = np.uint16([[[300, 5, 9], [70, 80, 90]]])
    image = decode("a", png_of_16_bits(pixels, (300, 5, 9)))
    assert image[3].tolist() == [[0, 255]]


def test_transparency_of_16_bit_gray_is_said_to_be_ignored():
    header, image = agree("a", png(2, 1, 16, 0, [np.array([7, 65535], ">u2").tobytes()], (7,)))
    assert image.tolist() == [[[7, 65535]]]
    assert header.notes == ("transparency of 16-bit gray is ignored",)


@pytest.mark.parametrize("orientation", [0, 9, 200, 65535])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientations_without_a_meaning_are_ignored(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif)
    header, image = agree("a", data)
    assert image.shape == (3, 7, 5)
    assert header.notes == ()


@pytest.mark.parametrize("exif", [b"nonsense", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0"])
def test_exif_data_that_is_text_or_nonsense_is_ignored(exif):
    data = encoded(Image.fromarray(PIXELS), exif=exif)
    header, image = agree("a", data)
    assert image.shape == (3, 7, 5)
    assert header.notes == (() if exif[:2] == b"MM" else ("unreadable EXIF data is ignored",))


def test_whole_numbers_of_32_bits_are_exact_or_refused():
    values = np.int32([[-(2**24), 2**24], [2**30, -7]])
    assert np.array_equal(agree("a", encoded(Image.fromarray(values), "TIFF"))[1][0], values)
    values[1, 1] = 2**24 + 1
    with pytest.raises(ValueError, match=r"whole numbers above 2\^24, which float32 would round: save"):
        decode("a", encoded(Image.fromarray(values), "TIFF"))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("L", (4, 4), color) for color in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (agree("a.gif", data)[1] == 10).all()


def test_pages_are_not_guessed_to_be_bands():
    pages = [Image.new("F", (4, 4), color) for color in (1.0, 2.0)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"it has 2 pages: save bands as one .npy \[C, H, W\]"):
        read_header("a.tif", data)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_headers_at_the_end_of_a_file_need_all_of_it(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind, exif=exif, lossless=True)
    assert len(data) > 4096
    assert needs_whole(data[:4096])
    (tmp_path / "a.png").write_bytes(data)
    dataset = open_dataset(tmp_path)
    assert dataset.image_shape == dataset.images(np.array([0])).shape[1:] == (3, 80, 60)


def test_a_tiff_of_several_large_pages_is_a_damaged_image(tmp_path):
    pages = [Image.fromarray(RNG.integers(0, 256, (64, 80, 3), dtype=np.uint8)) for _ in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"image 'a.tif' in .* cannot be read \(it has 2 pages"):
        open_dataset(tmp_path)


def test_only_the_formats_of_the_documentation_are_tried():
    for kind in ("PPM", "TGA", "ICO"):
        with pytest.raises(ValueError, match="cannot identify it as PNG, JPEG, WebP, BMP, GIF or TIFF"):
            read_header("a.png", encoded(Image.new("RGB", (16, 16)), kind))


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


def header_text(shape, kind="|u1"):
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "EOF: reading magic string, expected 8 bytes got 0"),
        (b"PK\3\4zipped", "the magic string is not correct"),
        (b"\x93NUMPY", "EOF: reading magic string, expected 8 bytes got 6"),
        (npy_with_header("{'descr': '|u1', 'shape'"), "its .npy header is damaged"),
        (npy_with_header("(" * 9000), "its .npy header is damaged"),
        (npy_with_header("[" * 200 + "]" * 200), "its .npy header is damaged"),
        (npy_with_header("{1: 2, 'a': 3}"), "its .npy header is damaged"),
        (
            npy_with_header(header_text((10**6, 10**6))),
            r"promises 1,000,000,000,000 bytes .* more than there are",
        ),
        (npy_with_header(header_text((-2, -3, 4))), r"values \[-2, -3, 4\], more than there are"),
        (npy(np.zeros((3, 7, 5), np.uint8))[:-1], "expected 105 bytes got 104"),
    ],
)
def test_arrays_that_are_damaged(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        decode("a.npy", data)
    (tmp_path / "a.npy").write_bytes(data)
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match="skipped 1 of the 2 .* the first is 'a.npy'"):
        open_dataset(tmp_path, skip_damaged=True)


@pytest.mark.parametrize(
    "kind", [MemoryError, RecursionError, TypeError, KeyError, AttributeError, OverflowError]
)
def test_whatever_pillow_raises_names_the_image(tmp_path, monkeypatch, kind):
    for name in "ab":
        Image.fromarray(PIXELS).save(tmp_path / f"{name}.png")
    data = open_dataset(tmp_path)

    def raises(image):
        raise kind("why")

    monkeypatch.setattr(Image.Image, "load", raises)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", raises)
    words = "there is not enough memory for it" if kind is MemoryError else f"{kind.__name__}: .*why"
    with pytest.raises(ValueError, match=rf"image 'a.png' in .* cannot be read \({words}"):
        data.images(np.array([0]))


def test_a_picture_with_too_many_pixels_is_not_called_damaged(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    told = (
        r"image 'a.png' in .* cannot be read \(it has more than 178 million pixels, the limit .*: scale it down or cut "
        "it into tiles first, or in Python raise PIL.Image.MAX_IMAGE_PIXELS"
    )
    with pytest.raises(ValueError, match=told):
        open_dataset(tmp_path)


def test_pillows_limit_is_the_users(monkeypatch):
    data = encoded(Image.fromarray(PIXELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="more than 0 million pixels"):
        decode("a.png", data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode("a.png", data).shape == (3, 7, 5)
