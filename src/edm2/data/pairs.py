"""Images with what is given with each: another image, a vector of numbers."""

import hashlib
from typing import NamedTuple

import numpy as np

from edm2.data.dataset import ImageDataset
from edm2.data.views import View


class PairedDataset(View):
    """Images, each with a condition image, a vector, or both.

    Args:
        images: Images that a network learns to generate, with class labels if there are any.
        conditions: The condition of each image, in the same order; labels of its own are ignored.
        vectors: `[N, D]` numbers given with each image. Default: those that the images have already.

    Raises:
        ValueError: If there are not as many of them as images, or vectors are not finite numbers.
    """

    def __init__(
        self,
        images: ImageDataset,
        conditions: ImageDataset | None = None,
        vectors: np.ndarray | None = None,
    ) -> None:
        if vectors is None and images.vector_dim:
            vectors = images.vectors(np.arange(len(images)))
        digest = hashlib.sha256(f"pairs {images.fingerprint}".encode())
        if conditions is not None:
            if len(conditions) != len(images):
                raise ValueError(
                    f"{len(images)} images of {images.name!r} and {len(conditions)} conditions of "
                    f"{conditions.name!r}: give one condition for each image"
                )
            digest.update(conditions.fingerprint.encode())
        if vectors is not None:
            vectors = checked_vectors(vectors, len(images))
            digest.update(f"vectors {vectors.shape}".encode() + vectors.astype("<f4", copy=False).tobytes())
        super().__init__(images, digest.hexdigest(), conditions=conditions, vectors=vectors)

    def drawn(self, indices: np.ndarray, *, seed: int, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `ImageDataset.drawn`."""
        parts = (
            None if part is None else part.drawn(indices, seed=seed, position=position)[0]
            for part in (self._dataset, self.conditions)
        )
        images, given = parts
        assert images is not None
        return images, given


def checked_vectors(vectors: np.ndarray, size: int) -> np.ndarray:
    """Return vectors as `[size, D]` float32; `[size]` numbers are vectors of length 1.

    Raises:
        ValueError: If there is not one for each image, or they are not finite numbers.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim == 1:
        vectors = vectors[:, None]
    if vectors.ndim != 2 or len(vectors) != size or 0 in vectors.shape:
        raise ValueError(f"vectors must have the shape [{size}, D], one per image, not {list(vectors.shape)}")
    if vectors.dtype.kind not in "fiub":
        raise ValueError(f"vectors must be numbers, not {vectors.dtype}")
    vectors = vectors.astype(np.float32)
    bad = ~np.isfinite(vectors)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"vectors must be finite: entry {column} of image {row} is {vectors[row, column]}; fill it or leave the "
            "image out"
        )
    return vectors


class Given(NamedTuple):
    """Conditions, vectors and labels that a model generates images from.

    Attributes:
        conditions: `[N, C, H, W]` uint8 or float32.
        vectors: `[N, D]` float32, or None.
        labels: `[N]` int64, or None.
    """

    conditions: np.ndarray
    vectors: np.ndarray | None = None
    labels: np.ndarray | None = None
