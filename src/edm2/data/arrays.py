"""Whole data sets in one NumPy file."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.dataset import ArrayDataset, ImageDataset
from edm2.data.npy import as_image, as_stored, channels_last, image_layout, stored_kind
from edm2.data.pictures import refusing

_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")
_HASHED_BYTES = 1 << 28


class NpyDataset(ImageDataset):
    """Images in one `.npy` file, read from the disk when they are asked for.

    The file holds `[N, C, H, W]`, `[N, H, W, C]` with up to 4 channels, or `[N, H, W]`: bytes, or floats or 16-bit
    values, which become float32 unchanged. Labels lie beside it, `x.labels.npy` for `x.npy`, as `[N]` integers.

    The fingerprint is of all values up to 256 MiB; of a larger file, of evenly spaced images that fill as much.

    Args:
        path: The file.
        labels: Whether to read labels.

    Raises:
        ValueError: If the file is damaged, of another shape or type, or the labels do not fit.
    """

    def __init__(self, path: Path, *, labels: bool = True) -> None:
        self._path = path
        self._array: Any = None
        with _refusing(f"{path} is not an array of images", "make it with numpy.save"):
            array = self._open()
            if array.ndim not in (3, 4) or 0 in array.shape:
                raise ValueError(
                    f"its array has the shape {list(array.shape)}, but must have [N, C, H, W], [N, H, W, C] with C "
                    "up to 4, or [N, H, W]"
                )
            shape, _ = image_layout(array.shape[1:])
            dtype = np.dtype(stored_kind(array.dtype))
        beside = path.with_suffix(".labels.npy")
        values = None
        if labels and beside.exists():
            with _refusing(f"{beside} does not hold labels", "make it with numpy.save, [N] integers"):
                values = np.array(_mapped(beside))
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
            self._array = _mapped(self._path)
        array: np.ndarray = self._array
        return array

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
        path: The file, with `images` (or `arr_0`) shaped as in `NpyDataset`, and `labels` (or `arr_1`).
        labels: Whether to read labels.

    Raises:
        ValueError: If the file is damaged, has no images, or the labels do not fit.
    """
    advice = "make it with numpy.savez(path, images=[N, C, H, W], labels=[N])"
    with _refusing(f"{path} is not a data set", advice):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a whole .npz file")
        with np.load(path, allow_pickle=False) as archive:
            image_key, label_key = (
                next((k for k in wanted if k in archive.files), None) for wanted in (_IMAGE_KEYS, _LABEL_KEYS)
            )
            if image_key is None:
                raise ValueError(f"it holds {', '.join(archive.files) or 'nothing'}, but no 'images'")
            images = as_stored(archive[image_key])
            values = archive[label_key] if labels and label_key else None
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and channels_last(images.shape[1:]):
        images = images.transpose(0, 3, 1, 2)
    return ArrayDataset(images, values, name=path.stem)


def _mapped(path: Path) -> np.ndarray:
    # Mapping refuses a header that promises more than there is.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an .npz file by another name")
    return array


@contextmanager
def _refusing(what: str, advice: str) -> Iterator[None]:
    try:
        with refusing():
            yield
    except ValueError as error:
        raise ValueError(f"{what} ({error}): {advice}") from error
