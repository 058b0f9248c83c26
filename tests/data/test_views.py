"""Views of data sets: functions of the user's own and random crops, as a run draws them and as they are elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.data import (
    ArrayDataset,
    Batches,
    ImageDataset,
    PaddedDataset,
    PairedDataset,
    Subset,
    TransformedDataset,
    crop_at_random,
    open_dataset,
)

COUNT = 24
# Every pixel has a value of its own, by which a crop tells where it was cut out.
IMAGES = np.arange(COUNT * 16 * 24, dtype=np.float32).reshape(COUNT, 1, 16, 24)
EVERY = np.arange(COUNT)


def pairs() -> PairedDataset:
    """The condition is every fourth pixel."""
    return PairedDataset(
        ArrayDataset(IMAGES, EVERY % 3), ArrayDataset(IMAGES[:, :, ::4, ::4]), EVERY[:, None]
    )


def corners(images: np.ndarray, rows: np.ndarray = EVERY) -> np.ndarray:
    """Row and column of each crop's first pixel."""
    return np.stack(np.divmod(images[:, 0, 0, 0].astype(int) - rows * 16 * 24, 24), axis=1)


def given_of(data: ImageDataset) -> ImageDataset:
    assert data.conditions is not None
    return data.conditions


def test_image_and_condition_are_cut_alike_anywhere() -> None:
    data = crop_at_random(pairs(), 8)
    assert (data.image_shape, given_of(data).image_shape) == ((1, 8, 8), (1, 2, 2))
    seen = set()
    for position in range(0, 480, COUNT):
        images, given = data.drawn(EVERY, seed=0, position=position)
        found = corners(images)
        for image, (row, column), whole in zip(images, found, IMAGES, strict=True):
            assert np.array_equal(image, whole[:, row : row + 8, column : column + 8])
        assert given is not None
        assert np.array_equal(given, images[:, :, ::4, ::4])
        seen |= set(map(tuple, found.tolist()))
    assert seen == {(row, column) for row in (0, 4, 8) for column in (0, 4, 8, 12, 16)}
    alone = crop_at_random(ArrayDataset(IMAGES), 8).drawn(EVERY, seed=0, position=0)[0]
    assert (corners(alone) % 4).any()


def test_draws_depend_on_seed_and_position_alone() -> None:
    data = crop_at_random(pairs(), 8)
    whole = data.drawn(EVERY, seed=3, position=100)[0]
    parts = [data.drawn(EVERY[k : k + 7], seed=3, position=100 + k)[0] for k in range(0, COUNT, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(data.drawn(EVERY, seed=4, position=100)[0], whole)
    assert not np.array_equal(data.drawn(EVERY, seed=3, position=101)[0], whole)
    # NumPy guarantees these bits, so a run continues under another release.
    assert corners(data.drawn(EVERY[:4], seed=0, position=0)[0], EVERY[:4]).tolist() == [
        [8, 0],
        [8, 8],
        [8, 16],
        [8, 4],
    ]


def test_outside_of_a_run_an_image_stays_as_it_is() -> None:
    data = crop_at_random(pairs(), 8)
    fixed = data.images(EVERY)
    assert np.array_equal(data.images(EVERY[::-1])[::-1], fixed)
    assert np.array_equal(given_of(data).images(EVERY), fixed[:, :, ::4, ::4])
    assert len({tuple(corner) for corner in corners(fixed).tolist()}) > 5
    assert np.array_equal(data.labels(EVERY), EVERY % 3)
    assert np.array_equal(data.vectors(EVERY)[:, 0], EVERY)


def test_the_loader_draws_and_other_views_pass_draws_on() -> None:
    data = crop_at_random(pairs(), 8)
    with Batches(Subset(data, EVERY[::-1]), 6, seed=5, start=6, stop=12) as batches:
        [batch] = batches
    assert batch.conditions is not None
    assert np.array_equal(batch.conditions, batch.images[:, :, ::4, ::4])
    assert batch.vectors is not None
    chosen = batch.vectors[:, 0].long().numpy()
    assert np.array_equal(batch.images, data.drawn(chosen, seed=5, position=6)[0])
    one = crop_at_random(ArrayDataset(IMAGES), 8)
    images, given = PaddedDataset(PairedDataset(one, one), 12).drawn(EVERY, seed=0, position=7)
    assert given is not None
    assert np.array_equal(images, given)
    assert np.array_equal(images[:, :, 2:10, 2:10], one.drawn(EVERY, seed=0, position=7)[0])


def brighter(image: np.ndarray, condition: Any, random: np.random.Generator) -> Any:
    return image * np.float32(random.uniform(1, 2)), condition


def test_a_function_of_ones_own() -> None:
    data = TransformedDataset(pairs(), brighter, tag="a")
    images, given = data.drawn(EVERY, seed=0, position=0)
    factor = images.reshape(COUNT, -1)[:, 1:] / IMAGES.reshape(COUNT, -1)[:, 1:]
    assert np.allclose(factor, factor[:, :1])
    assert factor.min() >= 1
    assert np.ptp(factor) > 0.5
    assert np.array_equal(given, IMAGES[:, :, ::4, ::4])  # type: ignore[arg-type]
    prints = {TransformedDataset(pairs(), brighter, tag=tag).fingerprint for tag in "ab"}
    assert len({*prints, pairs().fingerprint}) == 3
    halves = TransformedDataset(
        ArrayDataset(IMAGES.astype(np.uint8)), lambda image, *_: (image[:, ::2] / 2, None), tag="halves"
    )
    assert (halves.image_shape, halves.dtype) == ((1, 8, 24), np.float32)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda image, given, _: (image, None), "must return a condition for images that have one"),
        (
            lambda image, given, _: (image[0], given),
            r"made an image of float32 \[16, 24\]: return \[C, H, W\]",
        ),
        (lambda image, given, _: (image.astype(int), given), "made an image of int64"),
    ],
)
def test_functions_that_make_no_images(function: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TransformedDataset(pairs(), function, tag="x")


def test_results_that_are_not_alike() -> None:
    data = TransformedDataset(pairs(), lambda i, g, _: (i[:, : 8 if i[0, 0, 0] else 4], g), tag="x")
    with pytest.raises(
        ValueError, match=r"made image 1 float32 \[1, 8, 24\], and the first image float32 \[1, 4"
    ):
        data.images(EVERY)
    with pytest.raises(ValueError, match="the function made image 1 hold values that are not finite"):
        TransformedDataset(pairs(), lambda i, g, _: (np.where(i == 384, np.inf, i), g), tag="x").images(EVERY)


def test_crops_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop 17 does not fit images of 16x24: give at most 16"):
        crop_at_random(pairs(), 17)
    with pytest.raises(
        ValueError, match="crop 6 must be a multiple of 4, because the images are 16x24 and their con"
    ):
        crop_at_random(pairs(), 6)
    np.save(tmp_path / "x.npy", IMAGES)
    assert open_dataset(tmp_path / "x.npy", pad_to=32, crop=30).image_shape == (1, 30, 30)
