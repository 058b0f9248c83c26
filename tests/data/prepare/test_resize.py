import numpy as np
import pytest
from PIL import Image

from edm2.data.prepare.resize import crop_centre, crop_wide, stretch

RNG = np.random.default_rng(0)


def test_the_size_wanted_is_left_alone():
    image = RNG.integers(0, 256, (3, 8, 6), dtype=np.uint8)
    for function in (crop_centre, stretch):
        assert np.array_equal(function(image, (8, 6)), image)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_twice_the_size_is_the_mean_of_four(dtype):
    image = RNG.integers(0, 256, (5, 12, 8)).astype(dtype)
    mean = image.astype(np.float64).reshape(5, 6, 2, 4, 2).mean((2, 4))
    found = crop_centre(image, (6, 4))
    assert found.dtype == dtype
    # Pillow rounds rows and columns apart, for bytes.
    assert np.abs(found - mean).max() <= (1 if dtype == np.uint8 else 1e-4)


def test_the_centre_of_a_longer_side_is_taken():
    columns = np.arange(10, dtype=np.float32) * np.ones((1, 4, 1), np.float32)
    assert crop_centre(columns, (4, 4))[0, 0].tolist() == [3, 4, 5, 6]
    assert crop_centre(columns.transpose(0, 2, 1), (4, 4))[0, :, 0].tolist() == [3, 4, 5, 6]


def test_the_rule_of_imagenet_step_by_step():
    pixels = RNG.integers(0, 256, (50, 67, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.resize((33, 25), Image.Resampling.BOX)  # 50 >= 2 * 16; 25 < 32 ends it
    image = image.resize((21, 16), Image.Resampling.BICUBIC)  # 33 * 16 / 25 = 21.12
    expected = np.asarray(image)[:, 2:18].transpose(2, 0, 1)
    assert np.array_equal(crop_centre(pixels.transpose(2, 0, 1), (16, 16)), expected)


@pytest.mark.parametrize(
    ("shape", "size"), [((7, 5), (16, 16)), ((33, 100), (8, 24)), ((100, 33), (8, 24)), ((9, 9), (9, 2))]
)
def test_any_size_is_reached_and_constants_stay(shape, size):
    for value in (np.uint8(200), np.float32(-3.5)):
        for function in (crop_centre, stretch):
            found = function(np.full((2, *shape), value), size)
            assert found.shape == (2, *size)
            assert np.allclose(found, value)


def test_colours_of_transparent_parts_do_not_bleed():
    image = np.zeros((4, 8, 8), np.uint8)
    image[0], image[3, :, :4] = 10, 255  # left: opaque dark red
    image[1, :, 4:] = 255  # right: transparent green
    found = crop_centre(image, (2, 2), alpha=True)
    opaque = found[3] > 200
    assert opaque.any()
    assert found[1][opaque].max() < 20
    found = stretch(image, (5, 5), alpha=True)
    assert found[1][found[3] > 100].max() < 20


def test_lanczos_scales_once():
    pixels = RNG.integers(0, 256, (1, 40, 32), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels[0]).resize((8, 10), Image.Resampling.LANCZOS))[1:9]
    assert np.array_equal(crop_centre(pixels, (8, 8), lanczos=True)[0], expected)
    assert not np.array_equal(crop_centre(pixels, (8, 8))[0], expected)


def test_a_wide_crop_lies_in_a_black_square():
    image = np.full((3, 30, 64), 200, np.uint8)
    found = crop_wide(image, (9, 16))
    assert found.shape == (3, 16, 16)
    assert (found[:, 3:12] == 200).all()
    assert found.sum() == 200 * 3 * 9 * 16
