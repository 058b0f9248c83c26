"""Data sets made from others: some of the images, a margin, a function of your own, random crops."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edm2.data.dataset import ImageDataset, Skipped, not_finite
from edm2.data.order import generator_at

Change = Callable[[np.ndarray, np.ndarray | None, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
"""From an image `[C, H, W]`, its condition or None, and random numbers to another image and condition."""


class View(ImageDataset):
    """Another data set with something changed; what is not said stays as it is there.

    Args:
        dataset: The other data set.
        fingerprint: See `ImageDataset`.
        rows: `[M]` indices of the images that it has. Default: all.
        **changes: What differs, as arguments of `ImageDataset`.
    """

    def __init__(
        self, dataset: ImageDataset, fingerprint: str, rows: np.ndarray | None = None, **changes: Any
    ) -> None:
        self._dataset = dataset
        self.decodes = dataset.decodes
        self.rows = np.arange(len(dataset)) if rows is None else rows
        same: dict[str, Any] = {
            "name": dataset.name,
            "image_shape": dataset.image_shape,
            "dtype": dataset.dtype,
            "labels": dataset.labels(self.rows) if dataset.num_classes else None,
            "num_classes": dataset.num_classes,
            "class_names": dataset.class_names,
            "size": len(self.rows),
            "skipped": dataset.skipped,
            "conditions": dataset.conditions,
            "vectors": dataset.vectors(self.rows) if dataset.vector_dim else None,
            "missing": dataset.missing,
        }
        super().__init__(fingerprint=fingerprint, **{**same, **changes})

    def image_name(self, index: int) -> str:
        """Name of an image in messages."""
        return self._dataset.image_name(int(self.rows[index]))

    def drawn(self, indices: np.ndarray, *, seed: int, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `ImageDataset.drawn`."""
        parts = self._dataset.drawn(self.rows[indices], seed=seed, position=position)
        images, given = (None if part is None else self._view(part, indices) for part in parts)
        assert images is not None
        return images, given

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self._view(self._dataset.images(self.rows[indices]), indices)

    def _view(self, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """What becomes of images of the other data set, or of their conditions."""
        return images


class Subset(View):
    """Some images of another data set, with what belongs to them.

    Args:
        dataset: The other data set.
        rows: `[M]` indices of the images, at least one.
        skipped: Images that are left out because they cannot be read, in addition to the other data set's.
    """

    def __init__(self, dataset: ImageDataset, rows: np.ndarray, *, skipped: Sequence[Skipped] = ()) -> None:
        digest = hashlib.sha256(f"without {dataset.fingerprint}".encode())
        digest.update(rows.astype("<i8").data)
        super().__init__(
            dataset,
            digest.hexdigest(),
            rows,
            skipped=(*dataset.skipped, *skipped),
            conditions=None if dataset.conditions is None else Subset(dataset.conditions, rows),
        )


class PaddedDataset(View):
    """Another data set's images in the middle of a larger square of zeros.

    Args:
        dataset: The data set to pad.
        size: New height and width in pixels. An odd pixel goes to the bottom and the right.

    Raises:
        ValueError: If the images are larger than the new size.
    """

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        channels, height, width = dataset.image_shape
        if size < max(height, width):
            raise ValueError(
                f"pad_to {size} is smaller than the images of {dataset.name!r} ({height}x{width}): "
                f"give at least {max(height, width)}, or None for no padding (--dataset.pad-to None)"
            )
        conditions = dataset.conditions
        if conditions is not None and (height, width) != (size, size):
            if conditions.image_shape[1:] != (height, width):
                raise ValueError(
                    f"pad_to {size} pads the images of {dataset.name!r}, {height}x{width}, but cannot pad conditions "
                    f"of another size, {conditions.image_shape[1]}x{conditions.image_shape[2]}, with them: pad or "
                    "resize both yourself, or leave pad_to out (--dataset.pad-to None)"
                )
            conditions = PaddedDataset(conditions, size)
        top, left = (size - height) // 2, (size - width) // 2
        self._margins = ((0, 0), (0, 0), (top, size - height - top), (left, size - width - left))
        super().__init__(
            dataset,
            hashlib.sha256(f"pad {size} {dataset.fingerprint}".encode()).hexdigest(),
            image_shape=(channels, size, size),
            conditions=conditions,
        )

    def _view(self, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return np.pad(images, self._margins)


class MirroredDataset(View):
    """Another data set's images, and then all of them mirrored left to right, with their conditions.

    Args:
        dataset: The images.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._count = len(dataset)
        super().__init__(
            dataset,
            hashlib.sha256(f"mirrored {dataset.fingerprint}".encode()).hexdigest(),
            np.tile(np.arange(len(dataset)), 2),
            conditions=None if dataset.conditions is None else MirroredDataset(dataset.conditions),
        )

    def _view(self, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return np.where((indices >= self._count)[:, None, None, None], images[..., ::-1], images)


class TransformedDataset(View):
    """Another data set whose images, and their conditions, a function changes each time that they are used.

    In training the random numbers depend on the run's seed and on the image's position in the run alone, so runs
    resume bit for bit. Elsewhere, such as for held-out images and for measuring mean and standard deviation, they
    depend on the image alone.

    Args:
        dataset: The images.
        change: Makes another image and condition of one image; every image must get the same shape and type. The loader
            calls it in threads.
        tag: What tells the function from others. It becomes part of the run's identity: change it with the function.

    Raises:
        ValueError: If the results are not images, at the start for the first image, otherwise when they are read.

    Example:
        >>> def brighten(image, condition, random):
        ...     return np.clip(image * random.uniform(0.8, 1.2), 0, 255).astype(np.uint8), condition
        >>> dataset = TransformedDataset(open_dataset("photos.zip"), brighten, tag="brighten 0.2")
    """

    def __init__(self, dataset: ImageDataset, change: Change, *, tag: str) -> None:
        self._change = change
        source, row = dataset.conditions, np.zeros(1, np.int64)
        given = None if source is None else source.images(row)[0]
        image, condition = change(dataset.images(row)[0], given, generator_at(0, 0))
        if (condition is None) != (source is None):
            raise ValueError(
                "the function must return a condition for images that have one, and None for others"
            )
        fingerprint = hashlib.sha256(f"changed {tag} {dataset.fingerprint}".encode()).hexdigest()
        super().__init__(dataset, fingerprint, **_kind_of(image, "image"))
        self.decodes = True
        if source is not None:
            self.conditions = _Conditions(self, source, fingerprint, **_kind_of(condition, "condition"))

    def drawn(self, indices: np.ndarray, *, seed: int, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `ImageDataset.drawn`."""
        images, given = self._dataset.drawn(indices, seed=seed, position=position)
        return self._changed(indices, images, given, seed, np.arange(position, position + len(indices)))

    def fixed(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images and conditions with random numbers that depend on the image alone."""
        source = self._dataset.conditions
        given = None if source is None else source.images(indices)
        return self._changed(indices, self._dataset.images(indices), given, 0, indices)

    def _changed(
        self, rows: np.ndarray, images: np.ndarray, given: np.ndarray | None, seed: int, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        kinds = [self, *([] if self.conditions is None else [self.conditions])]
        results = [np.empty((len(rows), *kind.image_shape), kind.dtype) for kind in kinds]
        for i, (row, key) in enumerate(zip(rows.tolist(), keys.tolist(), strict=True)):
            condition = None if given is None else given[i]
            made = self._change(images[i], condition, generator_at(seed, key))
            for kind, result, values in zip(kinds, results, made, strict=False):
                wanted = {"image_shape": kind.image_shape, "dtype": kind.dtype}
                if (found := _kind_of(values, "image")) != wanted:
                    raise ValueError(
                        f"the function made {self.image_name(row)} {found['dtype']} {list(found['image_shape'])}, and "
                        f"the first image {kind.dtype} {list(kind.image_shape)}: all must have the same shape and type"
                    )
                result[i] = values
                if kind.dtype != np.uint8 and (bad := not_finite(result[i], missing=kind.missing)):
                    raise ValueError(f"the function made {self.image_name(row)} hold {bad}")
        return results[0], results[1] if len(results) > 1 else None

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self.fixed(indices)[0]


class _Conditions(View):
    """The conditions of a transformed data set."""

    def __init__(
        self, whole: TransformedDataset, source: ImageDataset, fingerprint: str, **kind: Any
    ) -> None:
        self._whole = whole
        super().__init__(source, fingerprint, **kind)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        given = self._whole.fixed(indices)[1]
        assert given is not None
        return given


def _kind_of(values: Any, what: str) -> dict[str, Any]:
    values = np.asarray(values)
    if values.ndim != 3 or 0 in values.shape or values.dtype.kind not in "uf":
        raise ValueError(
            f"the function made an {what} of {values.dtype} {list(values.shape)}: return [C, H, W], uint8 or float"
        )
    return {
        "image_shape": values.shape,
        "dtype": np.dtype(np.uint8 if values.dtype == np.uint8 else np.float32),
    }


def crop_at_random(dataset: ImageDataset, size: int) -> TransformedDataset:
    """Cut a random square out of each image at each use, and the same part out of its condition.

    Args:
        dataset: The images, whose conditions may have another resolution.
        size: Side of the square, in pixels of the images.

    Raises:
        ValueError: If the images are smaller, or the square is not a whole number of the condition's pixels.
    """
    _, height, width = dataset.image_shape
    if not 1 <= size <= min(height, width):
        raise ValueError(
            f"crop {size} does not fit images of {height}x{width}: give at most {min(height, width)}"
        )
    shapes = [dataset.image_shape[1:]]
    if dataset.conditions is not None:
        shapes.append(dataset.conditions.image_shape[1:])
    # Where pixels of both begin together.
    step = math.lcm(
        *(side // math.gcd(side, shape[axis]) for shape in shapes for axis, side in enumerate(shapes[0]))
    )
    if size % step:
        raise ValueError(
            f"crop {size} must be a multiple of {step}, because the images are {height}x{width} and their conditions "
            f"{shapes[-1][0]}x{shapes[-1][1]}"
        )

    def cut(values: np.ndarray, corner: list[int]) -> np.ndarray:
        top, left = (
            start * now // whole
            for start, now, whole in zip(corner, values.shape[1:], (height, width), strict=True)
        )
        rows, columns = (
            size * now // whole for now, whole in zip(values.shape[1:], (height, width), strict=True)
        )
        return values[:, top : top + rows, left : left + columns]

    def crop(
        image: np.ndarray, condition: np.ndarray | None, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        # Raw words, because NumPy guarantees their bits across releases.
        words = random.bit_generator.random_raw(2)
        corner = [
            int(word) % ((side - size) // step + 1) * step
            for word, side in zip(words, (height, width), strict=True)
        ]
        return cut(image, corner), None if condition is None else cut(condition, corner)

    return TransformedDataset(dataset, crop, tag=f"crop {size}")


def rows_like(dataset: ImageDataset, classes: list[int]) -> np.ndarray:
    """Images of these classes in turn, spread over the data set; without classes, spread over all of it."""
    everything = np.arange(len(dataset))
    if not dataset.num_classes:
        return everything[np.linspace(0, len(dataset) - 1, len(classes)).astype(np.int64)]
    labels = dataset.labels(everything)
    members = {c: np.flatnonzero(labels == c) for c in set(classes)}
    shown = Counter[int]()
    rows = []
    for c in classes:
        own = members[c] if len(members[c]) else everything
        rows.append(own[shown[c] * len(own) // max(1, classes.count(c)) % len(own)])
        shown[c] += 1
    return np.array(rows)
