import numpy as np
import pytest

from edm2.data import ArrayDataset, PaddedDataset

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 2, 3, 5), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 0, 2, 2])


def test_images_and_labels_by_index():
    data = ArrayDataset(IMAGES, LABELS, name="six")
    assert len(data) == 6
    assert (data.name, data.image_shape, data.num_classes, data.dtype) == ("six", (2, 3, 5), 3, np.uint8)
    chosen = np.array([4, 0, 4])
    assert np.array_equal(data.images(chosen), IMAGES[chosen])
    assert data.labels(chosen).tolist() == [2, 0, 2]
    assert data.labels(chosen).dtype == np.int64
    assert data.images(np.empty(0, np.int64)).shape == (0, 2, 3, 5)


def test_changing_a_batch_does_not_change_the_data():
    data = ArrayDataset(IMAGES.copy())
    data.images(np.arange(6))[:] = 0
    assert np.array_equal(data.images(np.arange(6)), IMAGES)


def test_floats_become_float32():
    data = ArrayDataset(IMAGES.astype(np.float64))
    assert data.dtype == np.float32
    assert data.images(np.arange(2)).dtype == np.float32


def test_the_fingerprint_tells_data_sets_apart():
    changed = IMAGES.copy()
    changed[3, 1, 2, 4] ^= 1
    prints = {
        ArrayDataset(IMAGES, LABELS).fingerprint,
        ArrayDataset(IMAGES).fingerprint,
        ArrayDataset(changed, LABELS).fingerprint,
        ArrayDataset(IMAGES, LABELS[::-1]).fingerprint,
        ArrayDataset(IMAGES, LABELS, num_classes=9).fingerprint,
        ArrayDataset(IMAGES.astype(np.float32), LABELS).fingerprint,
        PaddedDataset(ArrayDataset(IMAGES, LABELS), 8).fingerprint,
        PaddedDataset(ArrayDataset(IMAGES, LABELS), 9).fingerprint,
    }
    assert len(prints) == 8
    assert ArrayDataset(IMAGES.copy(), LABELS.copy(), name="other").fingerprint in prints


def test_padding_puts_zeros_around_and_the_odd_pixel_last():
    data = PaddedDataset(ArrayDataset(IMAGES, LABELS), 8)
    batch = data.images(np.arange(6))
    assert data.image_shape == batch.shape[1:] == (2, 8, 8)
    assert np.array_equal(batch[:, :, 2:5, 1:6], IMAGES)
    assert batch.sum(dtype=np.int64) == IMAGES.sum(dtype=np.int64)
    assert np.array_equal(data.labels(np.arange(6)), LABELS)
    assert PaddedDataset(ArrayDataset(IMAGES), 8).num_classes == 0


def test_errors_of_arrays():
    with pytest.raises(ValueError, match=r"must have the shape \[N, C, H, W\], not \[6, 2, 3\]"):
        ArrayDataset(IMAGES[..., 0])
    with pytest.raises(ValueError, match="data set 'array' is empty"):
        ArrayDataset(IMAGES[:0])
    with pytest.raises(ValueError, match="images must be uint8 or float, not int64"):
        ArrayDataset(IMAGES.astype(np.int64))
    with pytest.raises(ValueError, match="values that are not finite"):
        ArrayDataset(np.full((1, 1, 2, 2), np.nan))
    with pytest.raises(ValueError, match=r"shape \[6\], one per image, not \[5\]"):
        ArrayDataset(IMAGES, LABELS[:5])
    with pytest.raises(ValueError, match="labels must be integers, not float64"):
        ArrayDataset(IMAGES, LABELS / 2)
    with pytest.raises(ValueError, match="label -1 is negative"):
        ArrayDataset(IMAGES, LABELS - 1)
    with pytest.raises(ValueError, match="label 2 does not fit num_classes 2"):
        ArrayDataset(IMAGES, LABELS, num_classes=2)


def test_errors_of_reading():
    data = ArrayDataset(IMAGES)
    for wrong in (6, -1):
        with pytest.raises(IndexError, match=f"image index {wrong} is outside data set 'array' of 6 images"):
            data.images(np.array([0, wrong]))
    with pytest.raises(ValueError, match="indices must be one-dimensional"):
        data.images(np.array([[0]]))
    with pytest.raises(ValueError, match="data set 'array' has no labels"):
        data.labels(np.array([0]))


def test_error_of_padding():
    with pytest.raises(ValueError, match=r"pad_to 4 is smaller than the images of 'array' \(3x5\)"):
        PaddedDataset(ArrayDataset(IMAGES), 4)
