import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest

from edm2.data import open_dataset, read_idx, sources
from edm2.extras import MissingExtra

RNG = np.random.default_rng(0)
TRAIN = "f91dab138925faf812f85c7aee90696ac5c55e3a8a95b30fedc8f2cb5dccb930"
TEST = "f8cf353d06e060383a1155d80abd5c65bf8cda93207f534c5ac4a59b081932e6"


def write_idx(path, array, code=8):
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx(tmp_path):
    for prefix, size in (("train", 5), ("t10k", 3)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", RNG.integers(0, 256, (size, 4, 6), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.arange(size, dtype=np.uint8))
    return tmp_path


def test_digits_keep_every_value_and_every_image():
    from sklearn.datasets import load_digits

    train, test = (open_dataset("digits", split=split) for split in ("train", "test"))
    assert (train.image_shape, train.num_classes) == ((1, 8, 8), 10)
    assert len(train) + len(test) == 1797
    assert 0.19 < len(test) / 1797 < 0.21
    images = np.concatenate([d.images(np.arange(len(d))) for d in (train, test)])
    back = np.rint(images[:, 0] * (16 / 255))
    original = load_digits().images
    assert np.array_equal(
        np.unique(back.reshape(1797, -1), axis=0), np.unique(original.reshape(1797, -1), axis=0)
    )
    assert images.max() == 255


def test_digits_test_split_is_stratified_and_apart():
    train, test = (open_dataset("digits", split=split) for split in ("train", "test"))
    of_train, of_test = (np.bincount(d.labels(np.arange(len(d)))) for d in (train, test))
    assert np.abs(of_test - 0.2 * (of_train + of_test)).max() <= 0.5
    known = {image.tobytes() for image in train.images(np.arange(len(train)))}
    assert not any(image.tobytes() in known for image in test.images(np.arange(len(test))))


def test_digits_are_pinned():
    # The split is part of every published figure.
    train, test = (open_dataset("digits", split=split) for split in ("train", "test"))
    assert train.fingerprint == TRAIN
    assert test.fingerprint == TEST
    assert open_dataset("digits", labels=False).num_classes == 0
    assert open_dataset("digits", pad_to=16).image_shape == (1, 16, 16)


def test_idx_folders_have_two_splits(idx):
    train, test = open_dataset(idx), open_dataset(str(idx), split="test")
    assert (len(train), len(test)) == (5, 3)
    assert (train.image_shape, train.num_classes) == ((1, 4, 6), 5)
    assert np.array_equal(train.images(np.arange(5))[:, 0], read_idx(idx / "train-images-idx3-ubyte.gz"))
    assert test.labels(np.arange(3)).tolist() == [0, 1, 2]
    padded = open_dataset(idx, pad_to=8).images(np.arange(5))
    assert np.array_equal(padded[:, :, 2:6, 1:7], train.images(np.arange(5)))


def test_idx_types_and_byte_order(tmp_path):
    for code, dtype in ((9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
        array = np.array([[-3, 2], [1, 100]], dtype)
        write_idx(tmp_path / "a", array, code)
        assert np.array_equal(read_idx(tmp_path / "a"), array)
        assert read_idx(tmp_path / "a").dtype.isnative


def test_idx_without_labels(idx):
    (idx / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="has no file of labels next to it"):
        open_dataset(idx)
    assert open_dataset(idx, labels=False).num_classes == 0


def test_idx_names_in_capitals(idx):
    for path in list(idx.iterdir()):
        path.rename(idx / path.name.upper())
    assert len(open_dataset(idx)) == 5


def test_idx_errors(idx):
    with pytest.raises(ValueError, match="has no split 'valid': its splits are test, train"):
        open_dataset(idx, split="valid")
    write_idx(idx / "train-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has \[4\] labels for 5 images"):
        open_dataset(idx)
    path = idx / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        open_dataset(idx)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=r"is damaged: its header promises 120 bytes .* there are 119"):
        open_dataset(idx)
    for extra in (bytes(9), bytes(1 << 25)):
        path.write_bytes(gzip.compress(gzip.decompress(whole) + extra))
        with pytest.raises(ValueError, match=r"promises 120 bytes .* there are more: copy"):
            open_dataset(idx)
    path.write_bytes(gzip.compress(b"\0\0\x08\3" + b"\xff" * 12 + bytes(50)))
    with pytest.raises(ValueError, match=r"is damaged: its header promises \d{29} bytes .* there are 50"):
        open_dataset(idx)
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match="is not an IDX file: it begins with 68 65 6c 6c"):
        open_dataset(idx)
    write_idx(path, np.zeros((5, 4), np.uint8))
    with pytest.raises(ValueError, match=r"must hold \[N, H, W\] bytes"):
        open_dataset(idx)


def test_fashion_mnist_where_it_is(idx, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", idx)
    data = open_dataset("fashion-mnist", split="test", pad_to=8)
    assert (data.name, len(data), data.image_shape) == ("fashion-mnist", 3, (1, 8, 8))
    assert data.class_names[9] == "Ankle boot"


@pytest.mark.skipif(not sources.FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_itself():
    data = open_dataset("fashion-mnist", split="test", pad_to=32)
    assert (len(data), data.image_shape, data.num_classes) == (10_000, (1, 32, 32), 10)
    assert np.bincount(data.labels(np.arange(10_000))).tolist() == [1000] * 10


def test_fashion_mnist_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "none")
    with pytest.raises(ValueError, match="run 'apt-get install dataset-fashion-mnist' as root"):
        open_dataset("fashion-mnist")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_built_in_splits(name):
    with pytest.raises(ValueError, match=f"{name} has no split 'valid': its splits are test, train"):
        open_dataset(name, split="valid")


def test_image_folders_have_one_split(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no split 'test': an image folder, ZIP or array has only the split"
    ):
        open_dataset(tmp_path, split="test")


def test_unknown_sources_show_near_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"'digts' is neither an existing path nor one of .*did you mean digits"
    ):
        open_dataset("digts")
    (tmp_path / "flowers").mkdir()
    with pytest.raises(ValueError, match=r"flower' is neither .*did you mean .*/flowers\?"):
        open_dataset(tmp_path / "flower")
    with pytest.raises(
        ValueError,
        match="'/no/such/place' is neither an existing path nor one of digits, fashion-mnist: check the spelling",
    ):
        open_dataset("/no/such/place")


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "a.zip").write_text("hello")
    with pytest.raises(ValueError, match="neither a folder nor a ZIP"):
        open_dataset(tmp_path / "a.zip")


def test_hugging_face_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in ("hf://user/name", tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(MissingExtra, match=r"needs the package 'datasets', .*\.\[data\]"):
            open_dataset(source)


def test_importing_does_not_load_scikit_learn():
    code = "import sys, edm2.data, edm2.metrics; print('sklearn' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"
