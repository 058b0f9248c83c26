"""Grids are exact, pixel for pixel."""

import io

import numpy as np
import PIL.Image
import pytest

from edm2.report import class_grid, image_grid, png_bytes, save_png


def pixels(image):
    return np.asarray(image)


def test_grey_layout_is_exact():
    images = np.arange(1, 13, dtype=np.uint8).reshape(3, 1, 2, 2)
    grid = image_grid(images, columns=2, padding=1)
    assert grid.mode == "LA"
    grey, opacity = pixels(grid)[..., 0], pixels(grid)[..., 1]
    expected = [[1, 2, 0, 5, 6], [3, 4, 0, 7, 8], [0, 0, 0, 0, 0], [9, 10, 0, 0, 0], [11, 12, 0, 0, 0]]
    np.testing.assert_array_equal(grey, expected)
    np.testing.assert_array_equal(opacity, 255 * (np.array(expected) > 0))


def test_scale_repeats_images_and_gaps():
    images = np.arange(1, 13, dtype=np.uint8).reshape(2, 1, 3, 2)
    small = pixels(image_grid(images, columns=2, padding=2))
    large = pixels(image_grid(images, columns=2, padding=2, scale=3))
    assert small.shape == (3, 6, 2)
    np.testing.assert_array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_no_padding_and_fewer_images_than_columns():
    images = np.arange(1, 9, dtype=np.uint8).reshape(2, 1, 2, 2)
    grid = pixels(image_grid(images, columns=9, padding=0))
    np.testing.assert_array_equal(grid[..., 0], [[1, 2, 5, 6], [3, 4, 7, 8]])


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_keep_their_order(channels):
    images = np.random.default_rng(0).integers(0, 256, (1, channels, 4, 5), np.uint8)
    grid = image_grid(images, columns=1)
    assert grid.mode == "RGBA"
    np.testing.assert_array_equal(pixels(grid)[..., :channels], images[0].transpose(1, 2, 0))
    if channels == 3:
        assert (pixels(grid)[..., 3] == 255).all()


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_stand_side_by_side_in_grey(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, channels, 3, 4), np.uint8)
    grid = pixels(image_grid(images, columns=1, padding=1))
    assert grid.shape == (7, 4 * channels, 2)
    np.testing.assert_array_equal(grid[:3, :, 0], np.concatenate(list(images[0]), axis=1))
    np.testing.assert_array_equal(grid[4:, :, 0], np.concatenate(list(images[1]), axis=1))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (
            np.zeros((1, 1, 2, 2), np.float32),
            {},
            r"images are float32 \(1, 1, 2, 2\): give at least one, as uint8",
        ),
        (np.zeros((0, 1, 2, 2), np.uint8), {}, r"images are uint8 \(0, 1, 2, 2\): give at least one"),
        (np.zeros((3, 8, 8), np.uint8), {}, r"uint8 \(3, 8, 8\): give at least one, as uint8 \[N, C, H, W\]"),
    ],
)
def test_wrong_input_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **{"columns": 1, **options})


def test_png_is_lossless_and_the_same_every_time(tmp_path):
    grid = image_grid(np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2), columns=2)
    path = save_png(grid, tmp_path / "new" / "grid.png")
    assert path.read_bytes() == png_bytes(grid) == png_bytes(grid)
    with PIL.Image.open(io.BytesIO(path.read_bytes())) as back:
        np.testing.assert_array_equal(pixels(back), pixels(grid))
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"grid\.jpg' does not end in \.png"):
        save_png(PIL.Image.new("L", (1, 1)), tmp_path / "grid.jpg")


def test_classes_stand_in_columns_under_their_names():
    images = np.full((6, 3, 16, 16), 200, np.uint8)
    plain = image_grid(images, columns=3, scale=4)
    named = class_grid(images, 3, ("cat", "dog", "owl"))
    height = named.height - plain.height
    assert named.width == plain.width
    np.testing.assert_array_equal(pixels(named)[height:], pixels(plain))
    letters = pixels(named)[:height, :, 3] > 128
    step = (plain.width + 4) // 3
    assert all(letters[:, i * step : (i + 1) * step].any() for i in range(3))


def test_long_names_are_written_upwards():
    images = np.zeros((4, 1, 8, 8), np.uint8)
    short, long = (class_grid(images, 4, (name, "b", "c", "d")) for name in ("a", "a very long name"))
    assert long.height > short.height + 40


@pytest.mark.parametrize(("count", "classes", "names"), [(9, 0, ()), (9, 40, ()), (9, 10, "abcdefghij")])
def test_other_images_stand_in_a_square(count, classes, names):
    images = np.zeros((count, 1, 32, 32), np.uint8)
    assert class_grid(images, classes, names).size == image_grid(images, columns=3, scale=2).size


def test_many_classes_have_columns_without_names():
    images = np.zeros((20, 1, 64, 64), np.uint8)
    assert class_grid(images, 20, [str(i) for i in range(20)]).size == image_grid(images, columns=20).size
