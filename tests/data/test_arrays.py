import pickle
import struct
import zipfile

import numpy as np
import pytest

from edm2.data import arrays, open_dataset

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 3, 7, 5), dtype=np.uint8)
ALL = np.arange(6)


def test_one_array_with_labels_beside_it(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "x.labels.npy", ALL % 3)
    data = open_dataset(tmp_path / "x.npy")
    assert (data.name, data.image_shape, data.num_classes) == ("x", (3, 7, 5), 3)
    assert np.array_equal(data.images(np.array([4, 0])), IMAGES[[4, 0]])
    assert data.labels(ALL).tolist() == [0, 1, 2, 0, 1, 2]
    assert open_dataset(tmp_path / "x.npy", labels=False).num_classes == 0


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (IMAGES.transpose(0, 2, 3, 1), IMAGES),
        (IMAGES[:, 0], IMAGES[:, :1]),
        (IMAGES.astype(np.uint16) * 9, IMAGES.astype(np.float32) * 9),
        (IMAGES.astype(np.float64), IMAGES.astype(np.float32)),
    ],
)
def test_layouts_and_types(tmp_path, suffix, array, expected):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        np.savez(path, images=array)
    read = open_dataset(path).images(ALL)
    assert read.dtype == expected.dtype
    assert np.array_equal(read, expected)


def test_the_fingerprint_follows_values_and_labels(tmp_path):
    found = set()
    for array, labels in ((IMAGES, ALL), (IMAGES, ALL[::-1]), (IMAGES[::-1], ALL), (IMAGES, None)):
        np.save(tmp_path / "x.npy", array)
        if labels is None:
            (tmp_path / "x.labels.npy").unlink()
        else:
            np.save(tmp_path / "x.labels.npy", labels)
        found.add(open_dataset(tmp_path / "x.npy").fingerprint)
    assert len(found) == 4


def test_a_large_file_does_not_travel_to_workers(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1000, 3, 32, 32), np.uint8))
    data = open_dataset(tmp_path / "x.npy")
    data.images(ALL)
    sent = pickle.dumps(data)  # what multiprocessing does
    assert len(sent) < 20_000
    assert np.array_equal(pickle.loads(sent).images(ALL), data.images(ALL))


def test_npz_with_labels_and_numpys_own_names(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=IMAGES, labels=ALL)
    assert open_dataset(tmp_path / "x.npz").num_classes == 6
    np.savez(tmp_path / "x.npz", IMAGES, ALL)
    assert open_dataset(tmp_path / "x.npz").num_classes == 6
    assert open_dataset(tmp_path / "x.npz", labels=False).num_classes == 0


def test_values_that_are_not_finite_are_named(tmp_path):
    array = IMAGES.astype(np.float32)
    array[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", array)
    data = open_dataset(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"image 3 of .*x.npy holds values that are not finite"):
        data.images(ALL)
    with pytest.warns(UserWarning, match="skipped 1 of the 6 .* the first is 'image 3 of x.npy'"):
        data = open_dataset(tmp_path / "x.npy", skip_damaged=True)
    assert np.array_equal(data.images(np.arange(5)), array[[0, 1, 2, 4, 5]])


def test_the_first_image_may_be_the_damaged_one(tmp_path):
    array = IMAGES.astype(np.float32)
    array[0, 0, 0, 0] = np.inf
    np.save(tmp_path / "x.npy", array)
    with pytest.warns(UserWarning, match="skipped 1 of the 6 .* the first is 'image 0 of x.npy'"):
        assert len(open_dataset(tmp_path / "x.npy", skip_damaged=True)) == 5


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 5)), r"shape \[5, 5\], but must have \[N, C, H, W\]"),
        (np.zeros((2, 5, 5), np.int64), "type int64"),
        (np.array([{}, {}]), "is not an array of images .*: make it with numpy.save"),
    ],
)
def test_files_that_are_no_images(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "x.npy")


def test_files_with_the_suffix_of_the_other_kind(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES)
    (tmp_path / "x.npz").rename(tmp_path / "y.npy")
    with pytest.raises(
        ValueError, match=r"y.npy is not an array of images \(it is an .npz file by another name\)"
    ):
        open_dataset(tmp_path / "y.npy")
    np.save(tmp_path / "x.npy", IMAGES)
    (tmp_path / "x.npy").rename(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"y.npz is not a data set \(it is not a whole .npz file"):
        open_dataset(tmp_path / "y.npz")


@pytest.mark.parametrize("suffix", ["NPY", "NPZ"])
def test_suffixes_in_capitals(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    with open(path, "wb") as file:
        np.save(file, IMAGES) if suffix == "NPY" else np.savez(file, images=IMAGES)
    assert np.array_equal(open_dataset(path).images(ALL), IMAGES)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**12, 3, 8, 8), (-6, -3, 7, 5)])
def test_shapes_that_ask_for_more_than_there_is(tmp_path, suffix, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(99)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    if suffix == "npz":
        path.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", data)
    with pytest.raises(ValueError, match=r"is not a.*\): make it with numpy"):
        open_dataset(path)


def test_labels_too_large_to_count(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    for label in (10**6, 2**63):
        np.save(tmp_path / "x.labels.npy", np.array([label] * 6, np.uint64))
        with pytest.raises(
            ValueError, match=f"label {label} is too large: labels count classes from 0 and stay"
        ):
            open_dataset(tmp_path / "x.npy")


def test_the_fingerprint_of_a_large_file_is_of_some_images(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_HASHED_BYTES", 3 * IMAGES[0].nbytes)
    found = []
    for changed in (None, 0, 1, 5):
        array = IMAGES.copy()
        if changed is not None:
            array[changed] ^= 1
        np.save(tmp_path / "x.npy", array)
        found.append(open_dataset(tmp_path / "x.npy").fingerprint)
    assert found[0] == found[2]
    assert len(set(found)) == 3


def test_labels_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    (tmp_path / "x.labels.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x.labels.npy does not hold labels"):
        open_dataset(tmp_path / "x.npy")
    np.save(tmp_path / "x.labels.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"labels must have the shape \[6\]"):
        open_dataset(tmp_path / "x.npy")


def test_errors_of_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pictures=IMAGES)
    with pytest.raises(ValueError, match=r"it holds pictures, but no 'images'\): make it with numpy.savez"):
        open_dataset(path)
    np.savez(path, images=IMAGES.astype(np.int64))
    with pytest.raises(ValueError, match=r"x.npz is not a data set .*type int64"):
        open_dataset(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"x.npz is not a data set"):
        open_dataset(path)
