"""CIFAR as published: archives and folders of both versions; pickles run no code."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edm2.data import open_dataset
from edm2.data.cifar import open_cifar

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 3072), dtype=np.uint8)
NAMES10, NAMES100 = [f"class{i}" for i in range(10)], [f"fine{i:02d}" for i in range(100)]


class Python2Pickler(pickle._Pickler):  # type: ignore[misc, name-defined]
    """Writes bytes as Python 2 wrote its strings."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + len(obj).to_bytes(4, "little") + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes


def dumped(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def files_of(version: str) -> dict[str, bytes]:
    labels = [i % 10 for i in range(12)]
    if version == "cifar-10-batches-py":
        files = {
            f"data_batch_{i + 1}": dumped(
                {b"data": PIXELS[2 * i : 2 * i + 2], b"labels": labels[2 * i : 2 * i + 2]}
            )
            for i in range(5)
        }
        files["test_batch"] = dumped({b"data": PIXELS[10:], b"labels": labels[10:]})
        return {**files, "batches.meta": dumped({b"label_names": [name.encode() for name in NAMES10]})}
    if version == "cifar-100-python":
        parts = {"train": slice(0, 10), "test": slice(10, 12)}
        files = {
            name: dumped({b"data": PIXELS[part], b"fine_labels": labels[part], b"coarse_labels": [0] * 10})
            for name, part in parts.items()
        }
        return {**files, "meta": dumped({b"fine_label_names": [name.encode() for name in NAMES100]})}
    column = np.array(labels, np.uint8)[:, None]
    if version == "cifar-10-batches-bin":
        records = np.concatenate([column, PIXELS], 1)
        files = {f"data_batch_{i + 1}.bin": records[2 * i : 2 * i + 2].tobytes() for i in range(5)}
        return {
            **files,
            "test_batch.bin": records[10:].tobytes(),
            "batches.meta.txt": "\n".join(NAMES10).encode(),
        }
    records = np.concatenate([0 * column, column, PIXELS], 1)
    names = "\n".join(NAMES100).encode()
    return {
        "train.bin": records[:10].tobytes(),
        "test.bin": records[10:].tobytes(),
        "fine_label_names.txt": names,
    }


def write(root: Path, version: str, *, packed: bool, **changes: bytes) -> Path:
    files = files_of(version) | changes
    if packed:
        path = root / f"{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(f"{version}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path
    (root / version).mkdir()
    for name, data in files.items():
        (root / version / name).write_bytes(data)
    return root


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "version", ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]
)
def test_every_version_is_read(version: str, packed: bool, tmp_path: Path) -> None:
    path = write(tmp_path, version, packed=packed)
    for split, part in (("train", slice(0, 10)), ("test", slice(10, 12))):
        data = open_dataset(path, split=split)
        rows = np.arange(len(data))
        assert np.array_equal(data.images(rows).reshape(-1, 3072), PIXELS[part])
        assert data.labels(rows).tolist() == [i % 10 for i in range(12)][part]
        assert data.class_names == tuple(NAMES10 if "10-" in version else NAMES100)
    assert open_dataset(path, labels=False).num_classes == 0
    with pytest.raises(ValueError, match="has no split 'valid': its splits are test, train"):
        open_dataset(path, split="valid")


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    path = write(
        tmp_path, "cifar-100-python", packed=True, train=pickle.dumps({b"data": Hostile()}, protocol=2)
    )
    with pytest.raises(ValueError, match=r"train of .* is damaged .it asks for .*: download it again"):
        open_dataset(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dumped({b"data": PIXELS[:3, :100], b"fine_labels": [0, 1, 2]}),
            r"its pixels are not \[N, 3072\] bytes",
        ),
        (dumped({b"data": PIXELS[:3].T.copy().T, b"fine_labels": [0, 1, 2]}), r"its pixels are not"),
        (dumped({b"data": PIXELS[:3], b"fine_labels": [0]}), "it has 1 labels for 3 images"),
        (dumped({b"data": 3, b"fine_labels": [0]}), "no attribute 'state'"),
        (dumped([1]), "is damaged"),
        (b"", "is damaged"),
        (b"\x80\x02" + b"(" * 10, "is damaged"),
        (b"\x80\x02G\0.", r"is damaged .*unpack requires"),
    ],
    ids=["pixels", "transposed", "labels", "number", "list", "empty", "marks", "cut number"],
)
def test_damaged_pickles_are_refused(change: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path, "cifar-100-python", packed=False, train=change))


def test_archives_that_are_damaged_or_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz cannot be read as an archive of CIFAR"):
        open_cifar(tmp_path / "cifar.tar.gz")
    path = write(tmp_path, "cifar-10-batches-bin", packed=False, **{"data_batch_2.bin": b"123"})
    with pytest.raises(ValueError, match="its 3 bytes are not records of 3073"):
        open_dataset(path)
    (path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"has no data_batch_2\.bin: unpack or download it again"):
        open_dataset(path)
    assert open_cifar(tmp_path / "nothing") is None
