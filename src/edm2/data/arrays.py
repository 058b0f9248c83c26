"""Whole data sets in one NumPy file."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.dataset import ArrayDataset, ImageDataset, not_finite
from edm2.data.npy import (
    as_stored,
    channels_last,
    image_layout,
    open_array,
    read_arrays,
    stored_kind,
)
from edm2.data.pairs import Given, PairedDataset, checked_vectors
from edm2.data.pictures import refusing

# What an .npz file holds besides images and labels.
_GIVEN = ("conditions", "vectors", "mask")
_HASHED_BYTES = 1 << 28


class NpyDataset(ImageDataset):
    """Images in one `.npy` file, read from disk when they are needed.

    The file holds `[N, C, H, W]`, `[N, H, W, C]` with up to 4 channels, or `[N, H, W]`: bytes, or floats or 16-bit
    values, which become float32 unchanged. Labels are next to it, `x.labels.npy` for `x.npy`, as `[N]` integers, and
    vectors in `x.vectors.npy`, as `[N, D]` numbers.

    The fingerprint is of all values up to 256 MiB; of a larger file, of evenly spaced images that fill as much.

    Args:
        path: The file.
        labels: Whether to read labels.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: If the file is damaged, of another shape or type, or the labels do not fit.
    """

    decodes = False

    def __init__(self, path: Path, *, labels: bool = True, missing: bool = False) -> None:
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
                values = np.array(open_array(beside))
        beside, vectors = path.with_suffix(".vectors.npy"), None
        if beside.exists():
            with _refusing(f"{beside} does not hold vectors", "make it with numpy.save, [N, D] numbers"):
                vectors = checked_vectors(open_array(beside), len(array))
        super().__init__(
            name=path.stem,
            image_shape=shape,
            dtype=dtype,
            labels=values,
            fingerprint="",
            size=len(array),
            vectors=vectors,
            missing=missing and dtype == np.float32,
        )
        digest = hashlib.sha256(f"npy {array.shape} {array.dtype.str}".encode())
        for row in hashed_rows(len(array), array.nbytes // len(array)):
            digest.update(np.ascontiguousarray(array[row]).data)
        if self._labels is not None:
            digest.update(self._labels.astype("<i8", copy=False).data)
        if vectors is not None:
            digest.update(b"vectors" + vectors.astype("<f4", copy=False).tobytes())
        self.fingerprint = digest.hexdigest()

    def image_name(self, index: int) -> str:
        """Name of an image in messages."""
        return f"image {index} of {self._path.name}"

    def _open(self) -> np.ndarray:
        if self._array is None:
            self._array = open_array(self._path)
        array: np.ndarray = self._array
        return array

    def _read(self, indices: np.ndarray) -> np.ndarray:
        # All at once: a loop over images would keep other threads waiting.
        chosen = np.take(self._open(), indices, axis=0)
        _, last = image_layout(chosen.shape[1:])
        batch = as_stored(np.moveaxis(chosen, -1, 1) if last else chosen.reshape(-1, *self.image_shape))
        if batch.dtype == np.float32 and not_finite(batch, missing=self.missing):
            bad = (not_finite(image, missing=self.missing) for image in batch)
            index, reason = next((i, words) for i, words in zip(indices, bad, strict=True) if words)
            raise ValueError(f"image {index} of {self._path} holds {reason}")
        return np.ascontiguousarray(batch)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would travel to another process as a copy of all its values.
        return {**self.__dict__, "_array": None}


def hashed_rows(count: int, row_bytes: int) -> np.ndarray:
    """Rows that a fingerprint takes: all up to 256 MiB, else evenly spaced ones, because all would take minutes."""
    chosen = min(count, max(1, _HASHED_BYTES // row_bytes))
    return np.linspace(0, count - 1, chosen).astype(np.int64)


def open_npz(path: Path, *, labels: bool = True, missing: bool = False) -> ImageDataset:
    """Open images and what belongs to them from one `.npz` file, into memory.

    Args:
        path: The file, with `images` (or `arr_0`) shaped as in `NpyDataset`, and optionally: `labels` (or `arr_1`);
            `conditions`, one image for each, shaped likewise with channels, height and width of their own; `vectors`
            `[N, D]`; `mask`, a boolean of the images' shape or with one channel, False where a value is missing.
        labels: Whether to read labels.
        missing: Whether NaN is a missing value. A mask makes the images float32, if they are bytes, with NaN where
            it is False.

    Raises:
        ValueError: If the file is damaged, has no images, or labels, conditions, vectors or mask do not fit.
    """
    advice = "make it with numpy.savez(path, images=[N, C, H, W], labels=[N]); see docs/pairs.md for what else it holds"
    with _refusing(f"{path} is not a data set", advice):
        found = read_npz(path)
        if "images" not in found:
            raise ValueError(f"it holds {', '.join(found)}, but no 'images'")
        images = channels_first(found["images"])
        if "mask" in found:
            images = _masked(images, found["mask"])
    dataset = ArrayDataset(
        images,
        found.get("labels") if labels else None,
        name=path.stem,
        missing=missing or "mask" in found,
    )
    if not found.keys() & {"conditions", "vectors"}:
        return dataset
    conditions = None
    if "conditions" in found:
        with _refusing(f"the conditions of {path} cannot be used", "store [N, C, H, W], one for each image"):
            conditions = ArrayDataset(
                channels_first(found["conditions"]), name=f"conditions of {path.stem}", missing=missing
            )
    return PairedDataset(dataset, conditions, found.get("vectors"))


def given_in_npz(path: Path, *, missing: bool = False) -> Given:
    """Read what a model is given from one `.npz` file: its `conditions` (or `images`), vectors and labels.

    Raises:
        ValueError: As in `open_npz`.
    """
    with _refusing(
        f"{path} does not hold conditions", "make it with numpy.savez(path, conditions=[N, C, H, W])"
    ):
        found = read_npz(path)
        images = channels_first(found.get("conditions", found.get("images")))  # type: ignore[arg-type]
        conditions = ArrayDataset(images, found.get("labels"), name=path.stem, missing=missing)
        rows = np.arange(len(images))
        return Given(
            conditions.images(rows),
            checked_vectors(found["vectors"], len(images)) if "vectors" in found else None,
            conditions.labels(rows) if "labels" in found else None,
        )


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Those arrays of an `.npz` file that `open_npz` names; `arr_0` and `arr_1` are called `images` and `labels`.

    Raises:
        ValueError: If the file is damaged, has neither images nor conditions, or an array holds Python objects.
    """
    names = ("images", "labels", *_GIVEN)
    content = read_arrays(path, [*names, "arr_0", "arr_1"])
    for name, other in (("images", "arr_0"), ("labels", "arr_1")):
        if name not in content and other in content:
            content[name] = content[other]
    found = {name: content[name] for name in names if name in content}
    if not found.keys() & {"images", "conditions"}:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
        raise ValueError(f"it holds {', '.join(held) or 'nothing'}, but no 'images'")
    return found


def channels_first(images: np.ndarray) -> np.ndarray:
    """Images of any layout that `NpyDataset` takes, as `[N, C, H, W]` uint8 or float32."""
    images = as_stored(images)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and channels_last(images.shape[1:]):
        images = images.transpose(0, 3, 1, 2)
    return images


def _masked(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Float images with NaN where the mask is False."""
    known = channels_first(mask).astype(bool)
    if known.ndim != 4 or known.shape not in (images.shape, (len(images), 1, *images.shape[2:])):
        raise ValueError(
            f"its mask has the shape {list(mask.shape)}, but must have that of the images {list(images.shape)}, or one "
            "channel"
        )
    masked: np.ndarray = np.where(known, images, np.nan).astype(np.float32)
    return masked


@contextmanager
def _refusing(what: str, advice: str) -> Iterator[None]:
    try:
        with refusing():
            yield
    except ValueError as error:
        raise ValueError(f"{what} ({error}): {advice}") from error
