"""Whole data sets in one NumPy file."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.dataset import ArrayDataset, ImageDataset
from edm2.data.npy import (
    as_image,
    as_stored,
    channels_last,
    image_layout,
    read_array,
    read_array_header,
    stored_kind,
)
from edm2.data.pictures import refusing

_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")
_HASHED_BYTES = 1 << 28
_HEADER_BYTES = 1 << 16  # more than NumPy reads of one


class NpyDataset(ImageDataset):
    """Images in one `.npy` file, read from the disk as they are asked for.

    The file holds `[N, C, H, W]`, `[N, H, W, C]` with up to 4 channels, or `[N, H, W]`, of bytes, or of floats
    or 16-bit values, which become float32 unchanged. Labels lie beside it: `x.labels.npy` for `x.npy`, `[N]`.

    Its fingerprint is of all values up to 256 MiB; beyond, of the images drawn evenly that fill as much.

    Args:
        path: the file.
        labels: False leaves labels out.

    Raises:
        ValueError: for a damaged file, another shape or type, or labels that do not fit.
    """

    def __init__(self, path: Path, *, labels: bool = True) -> None:
        self._path = path
        self._array: np.ndarray | None = None
        with _refusing(f"{path} is no array of images", "make it with numpy.save"):
            array = self._open()
            if array.ndim not in (3, 4) or 0 in array.shape:
                raise ValueError(
                    f"its array has the shape {list(array.shape)}, but must have [N, C, H, W], [N, H, W, C] with C "
                    "up to 4, or [N, H, W]"
                )
            shape, _ = image_layout(array.shape[1:])
            dtype = np.dtype(stored_kind(array.dtype))
        beside = path.with_suffix(".labels.npy")
        values = _load(beside) if labels and beside.exists() else None
        super().__init__(
            name=path.stem,
            image_shape=shape,
            dtype=dtype,
            labels=values,
            fingerprint="",
            size=len(array),
        )
        # All of a large file would take minutes at every start.
        count = min(len(array), max(1, _HASHED_BYTES * len(array) // array.nbytes))
        digest = hashlib.sha256(f"npy {array.shape} {array.dtype.str}".encode())
        for row in np.linspace(0, len(array) - 1, count).astype(np.int64):
            digest.update(np.ascontiguousarray(array[row]).data)
        if self._labels is not None:
            digest.update(self._labels.astype("<i8", copy=False).data)
        self.fingerprint = digest.hexdigest()

    def image_name(self, index: int) -> str:
        """What messages call an image."""
        return f"image {index} of {self._path.name}"

    def _open(self) -> np.ndarray:
        if self._array is None:
            with open(self._path, "rb") as file:
                read_array_header(file.read(_HEADER_BYTES), self._path.stat().st_size)
            self._array = np.lib.format.open_memmap(self._path, mode="r")
        return self._array

    def _read(self, indices: np.ndarray) -> np.ndarray:
        array = self._open()
        batch = np.empty((len(indices), *self.image_shape), self.dtype)
        for row, index in enumerate(indices):
            try:
                batch[row] = as_image(array[index])
            except ValueError as error:
                raise ValueError(f"image {index} of {self._path} is damaged ({error}): replace it") from error
        return batch

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would travel to another process as a copy of all its values.
        return {**self.__dict__, "_array": None}


def open_npz(path: Path, *, labels: bool = True) -> ArrayDataset:
    """Open images, and labels if any, from one `.npz` file, into memory.

    Args:
        path: the file, with `images` (or `arr_0`) shaped as in `NpyDataset`, and `labels` (or `arr_1`).
        labels: False leaves labels out.

    Raises:
        ValueError: for a damaged file, one without images, or labels that do not fit.
    """
    advice = "make it with numpy.savez(path, images=[N, C, H, W], labels=[N])"
    with _refusing(f"{path} is no data set", advice), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        image_key, label_key = (
            next((k for k in wanted if k in keys), None) for wanted in (_IMAGE_KEYS, _LABEL_KEYS)
        )
        if image_key is None:
            raise ValueError(f"it holds {', '.join(keys) or 'nothing'}, but no 'images'")
        images = as_stored(_member(archive, image_key))
        values = _member(archive, label_key) if labels and label_key else None
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and channels_last(images.shape[1:]):
        images = images.transpose(0, 3, 1, 2)
    return ArrayDataset(images, values, name=path.stem)


def _load(path: Path) -> np.ndarray:
    with _refusing(f"{path} holds no labels", "make it with numpy.save, [N] integers"):
        return read_array(path.read_bytes())


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    # As numpy.load does, after a look at what its header asks for.
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as file:
        read_array_header(file.read(_HEADER_BYTES), info.file_size)
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def _refusing(what: str, advice: str) -> Iterator[None]:
    try:
        with refusing():
            yield
    except ValueError as error:
        raise ValueError(f"{what} ({error}): {advice}") from error
