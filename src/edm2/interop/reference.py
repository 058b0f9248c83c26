"""Reference statistics of the official release: moments of a data set's features."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from edm2.interop.pickle_file import read_pickle, refusal
from edm2.interop.pickle_values import StoredArray
from edm2.metrics import FeatureStatistics
from edm2.metrics.tensor_file import read_header, read_tensor_file

REFERENCE_FORMAT = "edm2.reference/1"
_LARGEST_NPZ = 1 << 28
_MOST_NUMBERS = 1 << 26
_MOST_METRICS = 8


@dataclass(frozen=True, kw_only=True)
class ReferenceStatistics:
    """Moments of a data set's features.

    Attributes:
        mean: `[D]` float64.
        cov: `[D, D]` float64.
        num_images: Number of images they came from; None if the file does not say.
    """

    mean: np.ndarray
    cov: np.ndarray
    num_images: int | None

    def to_features(self, *, num_images: int | None = None) -> FeatureStatistics:
        """As `edm2.metrics` takes them.

        Args:
            num_images: For a file that does not say.

        Raises:
            ValueError: If the number of images is not known, or no data can have these moments.
        """
        count = self.num_images if self.num_images is not None else num_images
        if count is None:
            raise ValueError("the reference file does not say how many images it is of: give num_images")
        return FeatureStatistics.from_moments(self.mean, self.cov, num_images=count)


def read_reference_statistics(path: str | Path) -> dict[str, ReferenceStatistics]:
    """Read the moments of a data set's features.

    Args:
        path: `.pkl` with statistics by name of the metric, `.npz` with `mu` and `sigma` of FID's features, or
            the `.safetensors` file that `edm2 import` made from either.

    Returns:
        Metric, `fid` or `fd_dinov2` -> moments.

    Raises:
        ValueError: If the file holds anything else. Nothing in it is run in any case.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return {"fid": _moments(path, "fid", _read_npz(path), None)}
    if path.suffix == ".safetensors":
        return _read_imported(path)
    return statistics_of(path, read_pickle(path))


def statistics_of(path: Path, content: Any) -> dict[str, ReferenceStatistics]:
    """Do the work of `read_reference_statistics` on the result of `read_pickle`."""
    found = {k: v for k, v in content.items() if type(v) is dict} if type(content) is dict else {}
    named = all(isinstance(name, str) and name.isidentifier() for name in found)
    if not 0 < len(found) <= _MOST_METRICS or not named:
        raise refusal(path, "no reference statistics by name of a metric")
    num_images = content.get("num_images")
    if num_images is not None and (type(num_images) is not int or not 2 <= num_images < 1 << 40):
        raise refusal(path, "a num_images that is not a number of images")
    return {metric: _moments(path, metric, moments, num_images) for metric, moments in found.items()}


def is_imported_reference(path: str | Path) -> bool:
    """Whether a file holds statistics that `edm2 import` converted."""
    return bool(read_header(path).get("format") == REFERENCE_FORMAT)


def _read_imported(path: Path) -> dict[str, ReferenceStatistics]:
    try:
        header, arrays = read_tensor_file(path, "np", REFERENCE_FORMAT)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise refusal(path, f"no reference statistics of edm2 ({error})") from None
    found: dict[str, Any] = {"num_images": header.get("num_images")}
    for name, array in arrays.items():
        metric, _, moment = name.partition(".")
        found.setdefault(metric, {})[moment] = array
    return statistics_of(path, found)


def _read_npz(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the .npz file itself")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked <= _LARGEST_NPZ:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("mu", "sigma") if name in arrays}
    except (
        Exception
    ) as error:  # zipfile, zlib and NumPy's parser raise errors of many types for damaged files
        raise refusal(path, f"no whole archive of numbers ({error})") from None
    raise refusal(path, f"more than {_LARGEST_NPZ} bytes once unpacked")


def _moments(path: Path, metric: str, content: dict[str, Any], num_images: int | None) -> ReferenceStatistics:
    """Mean and covariance, where they are numbers that fit each other."""
    arrays = []
    for name, dims in (("mu", 1), ("sigma", 2)):
        value = content.get(name)
        array = value.array if isinstance(value, StoredArray) else value
        if not isinstance(array, np.ndarray) or array.ndim != dims or array.dtype.kind not in "fiu":
            raise refusal(path, f"no {name} of {metric} with {dims} dimension{'s' * (dims > 1)}")
        if array.size > _MOST_NUMBERS:
            raise refusal(
                path, f"a {name} of {metric} with {array.size} numbers, more than any features have"
            )
        arrays.append(np.array(array, np.float64))
    mean, cov = arrays
    if cov.shape != (len(mean), len(mean)) or not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise refusal(path, f"a mu and sigma of {metric} that do not fit each other, or are not finite")
    return ReferenceStatistics(mean=mean, cov=cov, num_images=num_images)
