"""What is in a source of images: counts, sizes, classes, moments, and what stands in the way of training on it."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edm2.data.dataset import Skipped
from edm2.data.files import Catalog, read_headers
from edm2.data.order import indices
from edm2.data.pictures import ARRAY, UNREADABLE, Header, common_mode, decode
from edm2.progress import Progress

_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `survey` found.

    Attributes:
        where: the source.
        num_images: in all, damaged ones included.
        num_bytes: in all, as stored.
        sizes: (height, width) -> number of images.
        modes: L, LA, RGB, RGBA, F (one band of numbers) or array -> number of images.
        kinds: (channels, type) of an image as it is read -> number of images.
        notes: what reading changes -> number of images.
        damaged: name and reason of every image that cannot be read.
        num_decoded: images whose pixels were read.
        mean: of each channel, of x / 127.5 - 1 for bytes; None where channels or types differ.
        std: likewise.
        minimum: smallest value of all, as stored.
        maximum: largest value of all, as stored.
        class_sizes: images of each class; None without labels.
        class_names: one a class, where they are known.
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


def survey(
    catalog: Catalog, *, sample: int | None = None, workers: int | None = None, quiet: bool = False
) -> Survey:
    """Look through a source.

    Args:
        catalog: the images, from `open_catalog`.
        sample: number of images whose pixels are read, drawn by a fixed rule; default: all.
        workers: threads; default: one a processor.
        quiet: show no progress.

    Raises:
        ValueError: for a sample below 1.
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
    for found, reason in _decoded(catalog, names, mode, workers, quiet):
        if isinstance(found, str):
            damaged.append(Skipped(found, reason))
        elif len(kinds) == 1:
            moments.add(found)
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
    )


class _Moments:
    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros((2, 1))
        self.minimum, self.maximum = np.inf, -np.inf

    def add(self, image: np.ndarray) -> None:
        values = image.astype(np.float64).reshape(len(image), -1)
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        if image.dtype == np.uint8:
            values = values / 127.5 - 1
        self._count += values.shape[1]
        self._sums = self._sums + np.stack([values.sum(1), np.square(values).sum(1)])

    def result(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        if not self._count:
            return None, None
        mean, square = self._sums / self._count
        return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())


def _kind(header: Header, mode: str | None) -> tuple[int, str]:
    picture = header.mode not in (ARRAY, "F") and mode is not None
    return len(mode) if picture and mode else header.channels, header.dtype


def _decoded(
    catalog: Catalog, names: list[str], mode: str | None, workers: int | None, quiet: bool
) -> Iterator[tuple[np.ndarray | str, str]]:
    # Each image, or its name and why it could not be read.
    def read(chunk: list[str]) -> list[tuple[np.ndarray | str, str]]:
        found: list[tuple[np.ndarray | str, str]] = []
        for name in chunk:
            try:
                found.append((decode(name, catalog.storage.read(name), mode), ""))
            except UNREADABLE as error:
                found.append((name, str(error)))
        return found

    workers = workers or os.cpu_count() or 1
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    with (
        Progress("reading images", len(names), "images", quiet=quiet) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        # A few chunks at a time, because all decoded images together may exceed the memory.
        for start in range(0, len(chunks), 2 * workers):
            for result in pool.map(read, chunks[start : start + 2 * workers]):
                yield from result
                progress.advance(len(result))
