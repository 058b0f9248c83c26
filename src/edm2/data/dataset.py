"""The interface of data sets, and the kind that lies in memory."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# More classes are a mistake, such as a hash taken for a class, and would fill the memory.
MAX_CLASSES = 1_000_000
TOO_MANY_CLASSES = f"labels count classes from 0 and stay below {MAX_CLASSES:,}: renumber the classes"


NOT_FINITE = "values that are not finite"


class Skipped(NamedTuple):
    """An image that was left out, and why."""

    name: str
    reason: str


class ImageDataset(ABC):
    """Images of one shape, read by index, with what belongs to them: class labels, condition images, vectors.

    Attributes:
        name: Short name for logs and reports.
        image_shape: `(C, H, W)`.
        dtype: uint8 for pixels, float32 for latents and other measured values.
        num_classes: Number of classes; 0 without labels.
        class_names: Name of each class, if known, else empty.
        fingerprint: A sha256 that two data sets share only if names, sizes, labels and checksums agree (files) or all
            values do (arrays). It is the same on every machine and does not depend on file times. It can miss a change
            inside a file of a folder above 64 KiB that keeps its size (see `edm2.data.storage.file_checksum`) and a
            change of some images in a `.npy` file above 256 MiB (see `NpyDataset`). A folder and a ZIP of it have the
            same one if no file is above 64 KiB.
        skipped: Images that were left out because they cannot be read.
        conditions: The condition of each image, such as a low-resolution version or the previous frame: a data set
            of the same length with a shape and type of its own. None for a set without conditions.
        vector_dim: Length of each image's vector, such as the time of day; 0 for none.
        missing: Whether values of float images may be missing, which is NaN.
        decodes: Whether reading an image is more than copying it, so that several threads are faster than one.
    """

    decodes = True

    def __init__(
        self,
        *,
        name: str,
        image_shape: tuple[int, int, int],
        dtype: np.dtype,
        labels: np.ndarray | None,
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        fingerprint: str,
        size: int,
        skipped: Sequence[Skipped] = (),
        conditions: "ImageDataset | None" = None,
        vectors: np.ndarray | None = None,
        missing: bool = False,
    ) -> None:
        self.name = name
        self.conditions, self.missing = conditions, missing
        self._vectors = vectors
        self.vector_dim = 0 if vectors is None else vectors.shape[1]
        self.skipped = tuple(skipped)
        self.image_shape = image_shape
        self.dtype = dtype
        self.class_names = tuple(class_names)
        self.fingerprint = fingerprint
        self._size = size
        self._labels = None if labels is None else checked_labels(labels, size)
        largest = -1 if self._labels is None else int(self._labels.max())
        self.num_classes = largest + 1 if num_classes is None else num_classes
        if largest >= self.num_classes:
            raise ValueError(
                f"label {largest} does not fit num_classes {self.num_classes}: labels count from 0, "
                f"so num_classes must be at least {largest + 1}"
            )

    def __len__(self) -> int:
        return self._size

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Read images.

        Args:
            indices: `[B]` integers in [0, len).

        Returns:
            `[B, C, H, W]` uint8 or float32.

        Raises:
            IndexError: If an index is outside the data set.
            ValueError: If an image is damaged; the message names it.
        """
        return self._read(self._checked(indices))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Classes of images.

        Args:
            indices: `[B]` integers in [0, len).

        Returns:
            `[B]` int64 in [0, num_classes).

        Raises:
            ValueError: If the data set has no labels.
        """
        if self._labels is None:
            raise ValueError(f"data set {self.name!r} has no labels: ask only where num_classes is above 0")
        chosen: np.ndarray = self._labels[self._checked(indices)]
        return chosen

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """Vectors of images.

        Args:
            indices: `[B]` integers in [0, len).

        Returns:
            `[B, vector_dim]` float32.
        """
        assert self._vectors is not None, "vector_dim is 0"
        chosen: np.ndarray = self._vectors[self._checked(indices)]
        return chosen

    def given(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Conditions and vectors of images, if there are any."""
        given = {} if self.conditions is None else {"conditions": self.conditions.images(indices)}
        return given | ({"vectors": self.vectors(indices)} if self.vector_dim else {})

    def drawn(self, indices: np.ndarray, *, seed: int, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Images and their conditions as a run uses them: where something is random, drawn anew at each use.

        Args:
            indices: `[B]` integers in [0, len).
            seed: Seed of the run, in [0, 2^64).
            position: Images of the run before these.

        Returns:
            As of `images`, and of `conditions.images` or None.
        """
        return self.images(indices), None if self.conditions is None else self.conditions.images(indices)

    def image_name(self, index: int) -> str:
        """Name of an image in messages."""
        return f"image {index}"

    @abstractmethod
    def _read(self, indices: np.ndarray) -> np.ndarray: ...

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1:
            raise ValueError(f"indices must be one-dimensional, not of shape {indices.shape}")
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if len(wrong):
            raise IndexError(
                f"image index {wrong[0]} is outside data set {self.name!r} of {len(self)} images"
            )
        return indices


class ArrayDataset(ImageDataset):
    """Images in memory.

    Args:
        images: `[N, C, H, W]` uint8 or a float type.
        labels: `[N]` integers from 0, or None.
        name: Short name for logs and reports.
        num_classes: Number of classes; default: the largest label plus 1.
        class_names: Name of each class.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: If the shape or type is another, there are no images, values are not finite, or the labels do not
            fit.
    """

    decodes = False

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "array",
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        missing: bool = False,
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must have the shape [N, C, H, W], not {list(images.shape)}")
        if 0 in images.shape:
            raise ValueError(f"data set {name!r} is empty: images have the shape {list(images.shape)}")
        if images.dtype != np.uint8:
            if not np.issubdtype(images.dtype, np.floating):
                raise ValueError(f"images must be uint8 or float, not {images.dtype}: convert them first")
            images = images.astype(np.float32)
            if bad := not_finite(images, missing=missing):
                raise ValueError(f"data set {name!r} holds {bad}")
        self._images = np.ascontiguousarray(images)
        super().__init__(
            name=name,
            image_shape=(images.shape[1], images.shape[2], images.shape[3]),
            dtype=images.dtype,
            labels=labels,
            num_classes=num_classes,
            class_names=class_names,
            fingerprint="",
            size=len(images),
            missing=bool(np.isnan(images).any()),
        )
        digest = hashlib.sha256(f"array {images.shape} {images.dtype.name} {self.num_classes}".encode())
        # One byte order for all machines.
        digest.update(self._images.astype(images.dtype.newbyteorder("<"), copy=False).data)
        if self._labels is not None:
            digest.update(self._labels.astype("<i8", copy=False).data)
        self.fingerprint = digest.hexdigest()

    def _read(self, indices: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = self._images[indices]
        return chosen


def check_split(split: str, known: Iterable[str], where: object) -> None:
    """Raise ValueError unless a source has a split."""
    splits = sorted(known)
    if split not in splits:
        raise ValueError(f"{where} has no split {split!r}: its splits are {', '.join(splits)}")


def not_finite(images: np.ndarray, *, missing: bool) -> str | None:
    """What is wrong with float images that hold infinite values, or NaN where that is not a missing value; or None."""
    infinite = np.isinf(images).any()
    if infinite or (not missing and np.isnan(images).any()):
        remedy = (
            "remove them first"
            if infinite
            else "if NaN marks missing values, say so with --dataset.missing mask (missing=True in Python); otherwise "
            "fill them first"
        )
        return f"{NOT_FINITE} ({1 - np.isfinite(images).mean():.2%}): {remedy}"
    return None


def checked_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """Return labels as `[size]` int64.

    Raises:
        ValueError: If they are not one whole number in [0, 1,000,000) an image.
    """
    labels = np.asarray(labels)
    if labels.shape != (size,):
        raise ValueError(f"labels must have the shape [{size}], one per image, not {list(labels.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(f"label {labels.min()} is negative: labels count from 0")
    if labels.max() >= MAX_CLASSES:
        raise ValueError(f"label {labels.max()} is too large: {TOO_MANY_CLASSES}")
    return labels.astype(np.int64)
