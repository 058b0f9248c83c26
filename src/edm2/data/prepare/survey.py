"""Survey of a source of images: counts, sizes, classes, moments, and obstacles to training."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edm2.data.dataset import Skipped
from edm2.data.files import Catalog, read_headers, unread_pictures
from edm2.data.order import indices
from edm2.data.pictures import ARRAY, UNREADABLE, Header, common_mode, decode
from edm2.data.workers import in_threads

_CHUNK = 64
_SLICE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Result of `survey`.

    Attributes:
        where: The source.
        num_images: Number of images, including damaged ones.
        num_bytes: Size of all images as stored.
        sizes: (height, width) -> number of images.
        modes: L, LA, RGB, RGBA, F (one band of numbers) or array -> number of images.
        kinds: (channels, type) of an image as it is read -> number of images.
        notes: What reading changes -> number of images.
        damaged: Name and reason for each image that cannot be read.
        num_decoded: Number of images whose pixels were read.
        mean: Mean of each channel, of x / 127.5 - 1 for bytes; None if channels or types differ.
        std: Standard deviation of each channel, of x / 127.5 - 1 for bytes; None if channels or types differ.
        minimum: Smallest value, as stored.
        maximum: Largest value, as stored.
        class_sizes: Number of images of each class; None without labels.
        class_names: Name of each class, if known.
        passed_over: Suffix -> number of files that are neither images nor labels.
        unread: Pictures in formats that are not read, in words; None if there are none.
    """

    where: str
    num_images: int
    num_bytes: int
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    kinds: Counter[tuple[int, str]]
    notes: Counter[str]
    damaged: list[Skipped]
    num_decoded: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    minimum: float
    maximum: float
    class_sizes: np.ndarray | None
    class_names: tuple[str, ...]
    passed_over: Mapping[str, int]
    unread: str | None


def survey(
    catalog: Catalog, *, sample: int | None = None, workers: int | None = None, quiet: bool = False
) -> Survey:
    """Survey a source.

    Args:
        catalog: The images, from `open_catalog`.
        sample: Number of images whose pixels are read, drawn by a fixed rule; default: all.
        workers: Number of threads; default: one per processor.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If the sample is below 1.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample {sample} must be at least 1")
    headers, damaged = read_headers(catalog)
    modes = Counter(header.mode for header in headers.values())
    pictures = modes.keys() - {ARRAY, "F"}
    mode = common_mode(pictures) if pictures else None
    kinds = Counter(_kind(header, mode) for header in headers.values())
    names = [name for name in catalog.names if name in headers]
    if sample is not None and sample < len(names):
        names = [names[i] for i in np.sort(indices(0, sample, size=len(names), seed=0))]
    moments = _Moments()
    for part, unread in _measured(catalog, names, mode, workers, quiet):
        damaged += unread
        if len(kinds) == 1:
            moments.add(part)
    mean, std = moments.result()
    return Survey(
        where=catalog.where,
        num_images=len(catalog.names),
        num_bytes=sum(catalog.sizes),
        sizes=Counter((header.height, header.width) for header in headers.values()),
        modes=modes,
        kinds=kinds,
        notes=Counter(note for header in headers.values() for note in header.notes),
        damaged=damaged,
        num_decoded=len(names),
        mean=mean,
        std=std,
        minimum=moments.minimum,
        maximum=moments.maximum,
        class_sizes=None
        if catalog.labels is None
        else np.bincount(catalog.labels, minlength=len(catalog.class_names)),
        class_names=tuple(catalog.class_names),
        passed_over=catalog.passed_over,
        unread=unread_pictures(catalog),
    )


class _Moments:
    """Count, sums and extremes of each channel, taken from a slice of an image at a time."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros((2, 1))
        self.minimum, self.maximum = np.inf, -np.inf

    def add_image(self, image: np.ndarray) -> None:
        flat = image.reshape(len(image), -1)
        for start in range(0, flat.shape[1], _SLICE):
            values = flat[:, start : start + _SLICE].astype(np.float64)
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))
            if image.dtype == np.uint8:
                values = values / 127.5 - 1
            self._count += values.shape[1]
            self._sums = self._sums + np.stack([values.sum(1), np.square(values).sum(1)])

    def add(self, other: "_Moments") -> None:
        self._count += other._count
        self._sums = self._sums + other._sums
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    def result(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        if not self._count:
            return None, None
        mean, square = self._sums / self._count
        return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())


def _kind(header: Header, mode: str | None) -> tuple[int, str]:
    picture = header.mode not in (ARRAY, "F") and mode is not None
    return len(mode) if picture and mode else header.channels, header.dtype


def _measured(
    catalog: Catalog, names: list[str], mode: str | None, workers: int | None, quiet: bool
) -> Iterator[tuple[_Moments, list[Skipped]]]:
    """Moments of each chunk of images, and those that cannot be read; a thread holds one image at a time."""

    def measure(chunk: Sequence[str]) -> tuple[_Moments, list[Skipped]]:
        moments, damaged = _Moments(), []
        for name in chunk:
            try:
                moments.add_image(decode(name, catalog.storage.read(name), mode))
            except UNREADABLE as error:
                damaged.append(Skipped(name, str(error)))
        return moments, damaged

    return in_threads(measure, names, what="reading images", chunk=_CHUNK, workers=workers, quiet=quiet)
