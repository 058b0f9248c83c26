"""What forecasts start from: frames, and where it is known, what came after them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.grids import check_fields, chunk_files, reading_fields
from edm2.data.npy import check_promise, open_array, read_arrays
from edm2.extras import needed

_NAMES = ("frames", "start", "conditions", "truth", "images", "vectors", "labels")
_ADVICE = (
    "give `frames` [N, time, C, H, W], or `start` [N, frames, C, H, W], or `conditions` [N, frames x C, H, W] as in "
    "training, and possibly `truth` [N, leads, C, H, W] and `vectors` [N, leads, V]"
)


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Starts of forecasts, in the data's own units.

    Attributes:
        start: `[N, frames, C, H, W]`, the latest frame last.
        truth: `[N, leads, C, H, W]` what followed; None if it is not known.
        vectors: `[N, leads, V]` that the model takes at each step.
        labels: `[N]` class of each case.
        numbers: `[N]` number of each case, which its noise depends on; None: 0, 1, 2 ...
    """

    start: np.ndarray
    truth: np.ndarray | None = None
    vectors: np.ndarray | None = None
    labels: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: np.ndarray) -> "Cases":
        """Some of the cases, which keep their numbers."""
        held = {**vars(self), "numbers": np.arange(len(self)) if self.numbers is None else self.numbers}
        given: dict[str, Any] = {name: None if v is None else v[rows] for name, v in held.items()}
        return Cases(**given)


def read_cases(path: Path, *, frames: int, channels: int) -> Cases:
    """Read cases from a file.

    Args:
        path: `.npz`, NetCDF or zarr with the arrays below, or `.npy` with one of the first three. A data set of pairs
            is such a file: its images are the truth of the first step. So is a forecast.
        frames: Past frames that the model continues.
        channels: Channels of a frame.

    Raises:
        ValueError: If the file cannot be read, or its arrays do not fit the model or each other.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give starts of forecasts")
    try:
        arrays = _read(path)
        found = _films(arrays, frames, channels)
        _check(found, frames, channels)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold starts of forecasts ({error}): {_ADVICE}") from error
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        array = open_array(path)
        return {"frames" if array.ndim == 5 else "conditions": array}
    if suffix == ".npz":
        return read_arrays(path, _NAMES)
    with needed(f"reading {path.name}"):
        import xarray
    with reading_fields(path):
        check_fields(path)
        with xarray.open_dataset(path) as content:
            found = {name: content[name] for name in _NAMES if name in content}
            files = sum(map(chunk_files, found.values()))
            check_promise(path, sum(array.nbytes for array in found.values()), files)
            return {name: array.values for name, array in found.items()}


def _films(arrays: dict[str, np.ndarray], frames: int, channels: int) -> Cases:
    given = [name for name in ("frames", "start", "conditions") if name in arrays]
    if len(given) != 1:
        raise ValueError(
            f"it holds {' and '.join(given)}: give one of them" if given else "it has none of the names"
        )
    films, truth = arrays[given[0]], arrays.get("truth")
    if given == ["conditions"]:
        if films.ndim == 3:  # one channel in all
            films = films[:, None]
        if films.ndim != 4 or films.shape[1] != frames * channels:
            raise ValueError(
                f"conditions of shape {list(films.shape)} must be [N, {frames * channels}, H, W]: {frames} frames of "
                f"{channels} channels"
            )
        films = films.reshape(len(films), frames, channels, *films.shape[2:])
        if truth is None and "images" in arrays:
            images = arrays["images"]
            truth = images[:, None, None] if images.ndim == 3 else images[:, None]
    elif films.ndim != 5:
        raise ValueError(f"{given[0]} of shape {list(films.shape)} must be [N, time, C, H, W]")
    if given == ["frames"] and films.shape[1] > frames:
        films, truth = films[:, :frames], films[:, frames:] if truth is None else truth
    return Cases(start=films, truth=truth, vectors=arrays.get("vectors"), labels=arrays.get("labels"))


def _check(cases: Cases, frames: int, channels: int) -> None:
    shape = cases.start.shape
    if shape[1:3] != (frames, channels) or not len(cases):
        raise ValueError(
            f"starts of shape {list(shape)} must be [N, {frames}, {channels}, H, W], N at least 1: the model continues "
            f"{frames} frames of {channels} channels"
        )
    truth = cases.truth
    if truth is not None and (truth.ndim != 5 or (len(truth), *truth.shape[2:]) != (shape[0], *shape[2:])):
        raise ValueError(f"truth of shape {list(truth.shape)} does not fit starts of shape {list(shape)}")
    for name, array in (("vectors", cases.vectors), ("labels", cases.labels)):
        if array is not None and len(array) != len(cases):
            raise ValueError(f"{len(array)} {name} for {len(cases)} starts: give one each")
