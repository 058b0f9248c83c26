"""Frechet distance between two sets of features, and the streaming statistics it needs.

Everything is float64 on the CPU: in the features' own precision the distance of similar sets is rounding.
"""

import numpy as np
import torch
import torch.distributed as dist

# Far beyond float32, yet their sixth power, in a kernel distance, stays within float64.
_LARGEST = 1e40
_FOLDED = 2048  # images whose features are added to the moments at a time
_NEGATIVE = -1e-5  # eigenvalue over the largest: rounding of a covariance that was stored in float32


class FeatureStatistics:
    """Mean and unbiased covariance of features that arrive in batches, in any sizes and order.

    Args:
        num_features: D. Default: that of the first batch.
    """

    def __init__(self, num_features: int | None = None) -> None:
        self.num_images = 0
        size = num_features or 0
        self._mean = np.zeros(size)
        # Sum of the outer products of deviations from the mean: (N - 1) times the covariance.
        self._scatter = np.zeros((size, size))
        # Features that are counted in num_images and not yet in the moments, and room for more and for one row.
        self._waiting, self._rows = 0, np.empty((0, size))

    @classmethod
    def from_moments(cls, mean: np.ndarray, cov: np.ndarray, *, num_images: int) -> "FeatureStatistics":
        """Statistics from known moments, such as those of a reference file.

        Args:
            mean: `[D]`.
            cov: `[D, D]`, unbiased, symmetric.
            num_images: Number of images they came from, at least 2.

        Raises:
            ValueError: For shapes that do not fit, values that are not finite, a matrix that is not a
                covariance, or too few images.
        """
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {list(mean.shape)} and cov {list(cov.shape)} must be [D] and [D, D]")
        if num_images < 2:
            raise ValueError(f"num_images {num_images} must be at least 2 for a covariance")
        if not (_within(mean, _LARGEST) and _within(cov, _LARGEST**2)):
            raise ValueError(
                f"mean and cov must be finite, of at most {_LARGEST:g} and {_LARGEST**2:g} in magnitude"
            )
        if not np.allclose(cov, cov.T, rtol=1e-6, atol=1e-9 * np.abs(cov).max(initial=0)):
            raise ValueError("cov must be symmetric")
        values = np.linalg.eigvalsh(cov) if len(mean) else np.zeros(1)
        if values[0] < _NEGATIVE * abs(values[-1]):
            raise ValueError(
                f"cov has the eigenvalue {values[0]:g} next to {values[-1]:g}: a covariance has no negative eigenvalue"
            )
        result = cls(len(mean))
        result.num_images = num_images
        result._mean = mean.copy()
        result._scatter = (cov + cov.T) / 2 * (num_images - 1)
        return result

    def update(self, features: np.ndarray | torch.Tensor) -> None:
        """Add a batch.

        Args:
            features: `[N, D]`.

        Raises:
            ValueError: If the shape is wrong or values are not finite.
        """
        if isinstance(features, torch.Tensor):
            # Through float32, because NumPy has no bfloat16; float64 stays.
            features = features.detach().cpu()
            features = (features if features.dtype == torch.float64 else features.float()).numpy()
        batch = np.asarray(features, dtype=np.float64)
        check_features(batch)
        if len(batch) == 0:
            return
        self._adopt(batch.shape[1])
        if len(self._rows) == 0:
            self._rows = np.empty((_FOLDED + 1, batch.shape[1]))
        while len(batch):
            part, batch = np.split(batch, [_FOLDED - self._waiting])
            self._rows[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)
            self.num_images += len(part)
            if self._waiting == _FOLDED:
                self._fold()

    def _fold(self) -> None:
        """Add the features that wait, with a single pass over the large matrix."""
        if not self._waiting:
            return
        rows, share = self._rows[: self._waiting + 1], self._waiting / self.num_images
        mean = rows[:-1].mean(axis=0)
        shift = mean - self._mean
        # As in `merge`, with the means' own deviation as one more row.
        rows[:-1] -= mean
        rows[-1] = shift * np.sqrt((self.num_images - self._waiting) * share)
        self._scatter += rows.T @ rows
        self._mean = self._mean + shift * share
        self._waiting = 0

    def merge(self, other: "FeatureStatistics") -> None:
        """Add all of another's images, as if they had come here.

        Args:
            other: Statistics of the same features; unchanged.

        Raises:
            ValueError: If the number of features differs.
        """
        if other.num_images == 0:
            return
        self._adopt(len(other._mean))
        self._fold()
        other._fold()
        total = self.num_images + other.num_images
        shift = other._mean - self._mean
        # The pairwise update of Chan, Golub and LeVeque: sums of squares would cancel.
        self._scatter = self._scatter + other._scatter
        self._scatter += np.outer(shift, shift) * (self.num_images * (other.num_images / total))
        self._mean = self._mean + shift * (other.num_images / total)
        self.num_images = total

    def _adopt(self, num_features: int) -> None:
        """Take the number of features from the first images, and insist on it afterwards."""
        if self.num_images == 0 and len(self._mean) == 0:
            self._mean, self._scatter = np.zeros(num_features), np.zeros((num_features, num_features))
        if len(self._mean) != num_features:
            raise ValueError(
                f"cannot mix {len(self._mean)} and {num_features} features: use one extractor throughout"
            )

    def all_reduce(self) -> None:
        """Merge the statistics of all processes of `torch.distributed`, in place.

        Afterwards every process holds the same bits, whatever each one saw, nothing included. A collective
        call over the CPU.

        Raises:
            ValueError: Where processes saw different numbers of features.
        """
        self._fold()
        self._rows = self._rows[:0].copy()
        total = FeatureStatistics()
        # One process at a time, so that memory does not grow with their number.
        for rank in range(dist.get_world_size()):
            part = [self]
            dist.broadcast_object_list(part, rank, device=torch.device("cpu"))
            total.merge(part[0])
        self.num_images, self._mean, self._scatter = total.num_images, total._mean, total._scatter

    @property
    def mean(self) -> np.ndarray:
        """`[D]` float64."""
        if self.num_images < 1:
            raise ValueError("a mean needs at least 1 image: update the statistics first")
        self._fold()
        return np.array(self._mean)

    @property
    def cov(self) -> np.ndarray:
        """`[D, D]` float64, unbiased."""
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, and there are {self.num_images}")
        self._fold()
        return self._scatter / (self.num_images - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    The trace of the matrix root is the sum of the singular values of `S1^(1/2) S2^(1/2)`. Unlike a root of
    `S1 S2`, that is real for every input and stays accurate where covariances are singular, as they are
    for fewer images than features.

    Args:
        a: Statistics of at least 2 images.
        b: Statistics of the same features, also of at least 2 images.

    Returns:
        The distance, in squared units of the features; at least 0.

    Raises:
        ValueError: If there are too few images, or numbers of features differ.

    Ref: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6.
    """
    mean_a, mean_b, cov_a, cov_b = a.mean, b.mean, a.cov, b.cov
    if len(mean_a) != len(mean_b):
        raise ValueError(
            f"cannot compare {len(mean_a)} with {len(mean_b)} features: use one extractor for both"
        )
    overlap = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return max(float(distance), 0.0)


def check_features(*sets: np.ndarray) -> None:
    """Raise a ValueError unless all are finite `[N, D]` of the same D."""
    for features in sets:
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"features must have the shape [N, D], not {list(features.shape)}")
        if not _within(features, _LARGEST):
            raise ValueError(
                f"features hold values that are not finite, or beyond {_LARGEST:g}: look at the images and extractor"
            )
    if len({features.shape[1] for features in sets}) > 1:
        numbers = " with ".join(str(features.shape[1]) for features in sets)
        raise ValueError(f"cannot compare {numbers} features: use one extractor for both")


def _within(values: np.ndarray, largest: float) -> bool:
    # As Python's float, because float32 has no such number; NaN compares as false.
    return float(np.abs(values).max(initial=0)) <= largest


def _root(cov: np.ndarray) -> np.ndarray:
    # A factor [D, rank] with F F^T = cov. Eigenvalues at the level of rounding count as zero: their roots,
    # eight digits larger, would not be negligible.
    values, vectors = np.linalg.eigh(cov)
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root: np.ndarray = vectors[:, keep] * np.sqrt(values[keep])
    return root
