"""Whole data sets in one NumPy file."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.dataset import ArrayDataset, ImageDataset
from edm2.data.pictures import UNREADABLE, as_image, as_stored, channels_last

_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")
_FINGERPRINT_IMAGES = 256


class NpyDataset(ImageDataset):
    """Images in one `.npy` file, read from the disk as they are asked for.

    The file holds `[N, C, H, W]`, `[N, H, W, C]` with up to 4 channels, or `[N, H, W]`, of bytes, or of floats
    or 16-bit values, which become float32 unchanged. Labels lie beside it: `x.labels.npy` for `x.npy`, `[N]`.

    Args:
        path: the file.
        labels: False leaves labels out.

    Raises:
        ValueError: for a damaged file, another shape or type, or labels that do not fit.
    """

    def __init__(self, path: Path, *, labels: bool = True) -> None:
        self._path = path
        self._array: Any = None
        try:
            array = self._open()
            if array.ndim not in (3, 4) or 0 in array.shape:
                raise ValueError(
                    f"its array has the shape {list(array.shape)}, but must have [N, C, H, W], [N, H, W, C] with C "
                    "up to 4, or [N, H, W]"
                )
            first = as_image(array[0])
        except UNREADABLE as error:
            raise ValueError(f"{path} is no array of images ({error}): make it with numpy.save") from error
        beside = path.with_suffix(".labels.npy")
        values = _load(beside) if labels and beside.exists() else None
        super().__init__(
            name=path.stem,
            image_shape=(first.shape[0], first.shape[1], first.shape[2]),
            dtype=first.dtype,
            labels=values,
            fingerprint="",
            size=len(array),
        )
        # All of a large file would take minutes at every start; images drawn evenly tell files apart.
        rows = np.unique(np.linspace(0, len(array) - 1, _FINGERPRINT_IMAGES).astype(np.int64))
        digest = hashlib.sha256(f"npy {array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array[rows]).data)
        if self._labels is not None:
            digest.update(self._labels.astype("<i8", copy=False).data)
        self.fingerprint = digest.hexdigest()

    def image_name(self, index: int) -> str:
        """What messages call an image."""
        return f"image {index} of {self._path.name}"

    def _open(self) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self._path, mmap_mode="r", allow_pickle=False)
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
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            keys = list(content.files)
            image_key, label_key = (
                next((k for k in wanted if k in keys), None) for wanted in (_IMAGE_KEYS, _LABEL_KEYS)
            )
            if image_key is None:
                raise ValueError(f"it holds {', '.join(keys) or 'nothing'}, but no 'images'")
            images = content[image_key]
            values = content[label_key] if labels and label_key else None
        images = as_stored(images)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no data set ({error}): make it with numpy.savez(path, images=[N, C, H, W], labels=[N])"
        ) from error
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and channels_last(images.shape[1:]):
        images = images.transpose(0, 3, 1, 2)
    return ArrayDataset(images, values, name=path.stem)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} holds no labels ({error}): make it with numpy.save, [N] integers"
        ) from error
