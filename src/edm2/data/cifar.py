"""CIFAR-10 and CIFAR-100 as published: their archives or unpacked folders, in the version for Python or the binary one.

The version for Python holds pickles. They are read without running code: all that they may name is an array, which is
rebuilt here from its bytes.
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from edm2.data.dataset import ArrayDataset, check_split

_PIXELS = 3 * 32 * 32
_MOST_BYTES = 1 << 28  # of a file; the largest that was published has 154 MB
_MOST_UNPACKED = 1 << 30  # of an archive
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

_Reader = Callable[[str], bytes]


class _Version(NamedTuple):
    name: str
    files: dict[str, tuple[str, ...]]  # of each split
    class_names: str  # file that holds them
    label: str  # key of a label in a pickle; empty for the binary version
    label_bytes: int = 0  # before the pixels of each image, the last of which is its class


_VERSIONS = (
    _Version("cifar-10", {"train": _BATCHES, "test": ("test_batch",)}, "batches.meta", "labels"),
    _Version("cifar-100", {"train": ("train",), "test": ("test",)}, "meta", "fine_labels"),
    _Version(
        "cifar-10",
        {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        "",
        1,
    ),
    _Version("cifar-100", {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", "", 2),
)


def open_cifar(path: Path, *, split: str = "train", labels: bool = True) -> ArrayDataset | None:
    """Open a split of CIFAR-10 or CIFAR-100, with the 100 fine classes.

    Args:
        path: An archive as published (`cifar-10-python.tar.gz`), the folder in it, or the folder that holds that one.
        split: "train" or "test".
        labels: Whether to read labels.

    Returns:
        Images `[N, 3, 32, 32]` uint8 in memory; None if the path holds something else.

    Raises:
        ValueError: If the split does not exist, or a file is missing or damaged.
    """
    found = _files(path)
    if found is None:
        return None
    names, read = found
    version = next((v for v in _VERSIONS if {v.class_names, v.files["train"][0]} <= names), None)
    if version is None:
        return None
    check_split(split, version.files, path)
    images, classes = [], []
    for name in version.files[split]:
        if name not in names:
            raise ValueError(f"{path} has no {name}: unpack or download it again")
        try:
            pixels, numbers = (
                _binary(read(name), version) if version.label_bytes else _pickled(read(name), version)
            )
        except (OSError, EOFError, tarfile.TarError, *_DAMAGED) as error:
            raise ValueError(f"{name} of {path} is damaged ({error}): download it again") from error
        images.append(pixels.reshape(-1, 3, 32, 32))
        classes.append(numbers)
    class_names = _class_names(read(version.class_names), version)
    return ArrayDataset(
        np.concatenate(images),
        np.concatenate(classes).astype(np.int64) if labels else None,
        name=version.name,
        class_names=class_names if labels else (),
        num_classes=len(class_names) if labels else None,
    )


def _files(path: Path) -> tuple[set[str], _Reader] | None:
    """Names of the files, and a function that reads one."""
    name = path.name.lower()
    if path.is_file() and name.endswith(_ARCHIVES) and "cifar" in name:
        return _unpacked(path)
    if not path.is_dir():
        return None
    inner = [path / name for name in _FOLDERS if (path / name).is_dir()]
    folder = inner[0] if len(inner) == 1 else path
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}

    def read(name: str) -> bytes:
        with open(folder / name, "rb") as file:
            return _bounded(file.read(_MOST_BYTES + 1))

    return names, read


def _unpacked(path: Path) -> tuple[set[str], _Reader]:
    files: dict[str, bytes] = {}
    wanted = {name for v in _VERSIONS for name in (v.class_names, *v.files["train"], *v.files["test"])}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.offset_data + member.size > _MOST_UNPACKED:
                    raise ValueError("it unpacks to more than 1 GiB")
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if member.isreg() and name in wanted else None
                if content is not None:
                    files[name] = _bounded(content.read(_MOST_BYTES + 1))
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"{path} cannot be read as an archive of CIFAR ({error}): download it again"
        ) from error
    return set(files), files.__getitem__


def _bounded(data: bytes) -> bytes:
    if len(data) > _MOST_BYTES:
        raise ValueError("it has more bytes than any file of CIFAR")
    return data


def _binary(data: bytes, version: _Version) -> tuple[np.ndarray, np.ndarray]:
    record = version.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise ValueError(f"its {len(data):,} bytes are not records of {record}")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, version.label_bytes :], records[:, version.label_bytes - 1]


def _pickled(data: bytes, version: _Version) -> tuple[np.ndarray, np.ndarray]:
    content = _load(data)
    array, labels = content[b"data"], content[version.label.encode()]
    _, shape, _, transposed, values = array.state
    count, pixels = shape
    if pixels != _PIXELS or transposed or not isinstance(values, bytes) or len(values) != count * _PIXELS:
        raise ValueError("its pixels are not [N, 3072] bytes")
    if len(labels) != count or not all(type(label) is int for label in labels):
        raise ValueError(f"it has {len(labels)} labels for {count} images")
    return np.frombuffer(values, np.uint8).reshape(count, _PIXELS), np.array(labels)


def _class_names(data: bytes, version: _Version) -> tuple[str, ...]:
    if version.label_bytes:
        return tuple(data.decode("ascii", "replace").split())
    try:
        content = _load(data)
        key = b"label_names" if version.name == "cifar-10" else b"fine_label_names"
        return tuple(name.decode("ascii", "replace") for name in content[key])
    except _DAMAGED as error:
        raise ValueError(f"{version.class_names} is damaged ({error}): download it again") from error


class _Stub:
    """Stands for an array or its type: keeps what a pickle says of it, and does nothing."""

    state: Any = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Python's own, because the memo of the one in C can be made to fill the memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise ValueError(f"it asks for {module}.{name}"[:80])
        return _Stub


_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
# What a pickle of something else than a batch can end in.
_DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def _load(data: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may end in any
        raise ValueError(str(error)[:100] or type(error).__name__) from error
