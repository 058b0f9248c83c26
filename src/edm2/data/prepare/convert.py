"""Conversion of any source to a data set of one size in the official layout."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ImageColor

from edm2.data.dataset import Skipped
from edm2.data.files import Catalog, damage_message, read_headers, warn_passed_over
from edm2.data.hugging_face import Entry, stream_hugging_face
from edm2.data.pictures import ARRAY, UNREADABLE, common_mode, decode, encoded
from edm2.data.prepare.chunks import Chunk, ChunkFolder, Made, begin, chunk_bytes, image_name, write_chunk
from edm2.data.prepare.resize import crop_centre, crop_wide, stretch
from edm2.data.workers import process_pool, result_of
from edm2.progress import Progress

CHUNK_IMAGES = 256
_CHUNK_PIXELS = 1 << 26  # a chunk is in memory until it is written
_MAX_PIXELS = 1 << 26
Mode = Literal["auto", "gray", "rgb", "rgba"]
_METHODS = {"center-crop": crop_centre, "center-crop-wide": crop_wide, "resize": stretch}
_MODES = {"gray": "L", "rgb": "RGB", "rgba": "RGBA"}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is done to every image.

    Args:
        size: New height and width in pixels; None keeps the images' own, which must be equal.
        method: "center-crop" covers the size and cuts out the centre; "center-crop-wide" then puts that in the middle
            of a black square of the longer side; "resize" stretches to the size.
        filter: "bicubic", as ImageNet was prepared for EDM2, or "lanczos".
        mode: New mode of pictures; "auto" is the mode that they have in common, or RGB. Arrays keep their channels.
        background: Colour, by name or as #rrggbb, on which transparent parts are laid; with "auto", all pictures then
            lose their transparency. None: white where the new mode has no transparency.

    Raises:
        ValueError: If the size is below 1 or above 67 million pixels, or the mode, method or colour is unknown, or a
            background is given for a mode that keeps transparency.
    """

    size: tuple[int, int] | None = None
    method: Literal["center-crop", "center-crop-wide", "resize"] = "center-crop"
    filter: Literal["bicubic", "lanczos"] = "bicubic"
    mode: Mode = "auto"
    background: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size {self.size} must be at least 1 by 1")
        if self.size is not None and self.size[0] * self.size[1] > _MAX_PIXELS:
            raise ValueError(
                f"size {self.size[0]}x{self.size[1]} is too large: an image has at most {_MAX_PIXELS:,} pixels, as "
                "8192x8192 has"
            )
        if self.method not in _METHODS:
            raise ValueError(f"method {self.method!r} must be {', '.join(_METHODS)}")
        if self.filter not in ("bicubic", "lanczos"):
            raise ValueError(f"filter {self.filter!r} must be bicubic or lanczos")
        if self.mode not in ("auto", *_MODES):
            raise ValueError(f"mode {self.mode!r} must be one of auto, {', '.join(_MODES)}")
        if self.background is None:
            return
        if self.mode == "rgba":
            raise ValueError(
                f"background {self.background!r} has no effect on mode rgba: leave one of them out"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"background {self.background!r} is not a colour: give a name such as white, or #rrggbb"
            ) from None

    @property
    def is_coloured(self) -> bool:
        """Whether the background is not gray, so that gray pictures become colour."""
        return self.background is not None and len(set(ImageColor.getrgb(self.background)[:3])) > 1


def convert(
    catalog: Catalog,
    dest: str | Path,
    conversion: Conversion,
    *,
    skip_damaged: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Made:
    """Bring all images of a source to one size and mode, in a new folder or ZIP.

    Pictures, and arrays of bytes with 1 or 3 channels, become PNG files, other arrays `.npy` files. The same call
    continues interrupted work, and finds finished work done. The same images and settings give the same bytes.

    Args:
        catalog: The images, from `open_catalog`.
        dest: New folder, or a file name that ends in `.zip`.
        conversion: What to do.
        skip_damaged: Whether to leave damaged images out; otherwise the first one is an error.
        workers: Number of processes; default: one per processor; 1 works in this process.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If an image is damaged or cannot be converted, the destination exists, or another process is
            writing it.
    """
    warn_passed_over(catalog)
    mode, size = _checked(catalog, conversion, skip_damaged)
    count = _chunk_images(size)
    settings = {
        "source": catalog.where,
        "images": len(catalog.names),
        "fingerprint of the images": catalog.digest(range(len(catalog.names))),
        "classes": list(catalog.class_names),
        "mode": mode,
    }
    work: dict[str, Any] = {"size": [conversion.size, conversion.method], "chunk": count}
    if conversion.background is not None:
        work["background"] = conversion.background
    if conversion.filter != "bicubic":
        work["filter"] = conversion.filter
    with begin(Path(dest), {**settings, **work}) as folder:
        job = _Job(folder, conversion, _MODES.get(mode), skip_damaged, catalog, count)
        if made := folder.finished():
            return _checked_again(job, made)
        starts = range(0, len(catalog.names), count)
        tasks = ((i, range(s, min(s + count, len(catalog.names)))) for i, s in enumerate(starts))
        _run(job, iter(tasks), len(catalog.names), workers, quiet)
        return _packed(job, len(starts), catalog.class_names)


def convert_stream(
    source: str | Path,
    dest: str | Path,
    conversion: Conversion,
    *,
    split: str = "train",
    skip_damaged: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Made:
    """Convert a stream of the library `datasets`, which is read once and not stored.

    Args:
        source: `hf://NAME`, or Arrow or Parquet files.
        dest: See `convert`.
        conversion: See `convert`; the mode must be given, because a stream cannot be surveyed first.
        split: Name of the split.
        skip_damaged: See `convert`.
        workers: See `convert`.
        quiet: See `convert`.

    Raises:
        ValueError: As in `convert` and `stream_hugging_face`, or if the mode is auto.
    """
    if conversion.mode == "auto":
        raise ValueError(
            "the common mode of a stream is not known before it is read: choose mode gray, rgb or rgba"
        )
    count = _chunk_images(conversion.size)
    settings = {"stream": f"{source}, {split}", **asdict(conversion), "chunk": count}
    for option in ("background", "filter"):  # so that work begun before there was this option continues
        if settings[option] == getattr(Conversion, option):
            del settings[option]
    with begin(Path(dest), settings) as folder:
        job = _Job(folder, conversion, _MODES[conversion.mode], skip_damaged, None, count)
        if made := folder.finished():
            return _checked_again(job, made)
        first = 0
        while folder.is_done(first):
            first += 1
        stream = stream_hugging_face(source, split=split, start=max(first - 1, 0) * count)
        if first:
            _check_same_stream(job, first - 1, stream.entries, count)
        tasks = _entry_tasks(stream.entries, first, count)
        last = _run(job, tasks, stream.num_images, workers, quiet, done=first * count)
        return _packed(job, max(first, last + 1), stream.class_names)


def _chunk_images(size: tuple[int, int] | None) -> int:
    """Images in a chunk: fewer if they are large, because a chunk is in memory until it is written."""
    pixels = 1 if size is None else size[0] * size[1]
    return max(1, min(CHUNK_IMAGES, _CHUNK_PIXELS // pixels))


def _check_same_stream(job: "_Job", number: int, entries: Iterator[Entry], count: int) -> None:
    # The content of a stream is known only when it is read, so the last finished chunk is made again.
    rows = list(enumerate(islice(entries, count), number * count))
    if chunk_bytes(_converted_chunk(job, rows)) != job.folder.path(number).read_bytes():
        raise ValueError(
            f"{job.folder.folder} holds unfinished work on other images (image {number * count} and later ones come "
            "out differently now: the stream has changed, or Pillow or NumPy): delete it, or choose another --out"
        )


class _Job(NamedTuple):
    folder: ChunkFolder
    conversion: Conversion
    mode: str | None
    skip_damaged: bool
    catalog: Catalog | None
    chunk_images: int

    @property
    def where(self) -> str:
        return self.catalog.where if self.catalog else "the stream"


_Rows = range | list[tuple[int, Entry]]
_Task = tuple[int, _Rows]


def _entry_tasks(entries: Iterator[Entry], first: int, count: int) -> Iterator[_Task]:
    number, rows = first, []
    for row, entry in enumerate(entries, first * count):
        rows.append((row, entry))
        if len(rows) == count:
            yield number, rows
            number, rows = number + 1, []
    if rows:
        yield number, rows


def _run(
    job: _Job, tasks: Iterator[_Task], total: int | None, workers: int | None, quiet: bool, done: int = 0
) -> int:
    """Make all chunks that are missing; returns the number of the last chunk, or -1."""
    workers = workers or os.cpu_count() or 1
    if total is not None:
        workers = min(workers, -(-total // job.chunk_images))
    last = -1
    # For a stream of unknown length, progress has no total.
    with Progress("converting", total or done, "images", done=done, quiet=quiet) as progress:
        if workers == 1:
            for number, rows in tasks:
                if not job.folder.is_done(number):
                    _convert_chunk(job, number, rows)
                progress.advance(len(rows))
                last = number
            return last
        with process_pool(workers, _prepare, job) as pool:
            pending: deque[tuple[int, int, Future[None] | None]] = deque()
            try:
                for number, rows in tasks:
                    known = job.folder.is_done(number)
                    pending.append(
                        (number, len(rows), None if known else pool.submit(_in_worker, number, rows))
                    )
                    if len(pending) > 2 * workers:
                        last = _finish(pending, progress)
                while pending:
                    last = _finish(pending, progress)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return last


def _finish(pending: "deque[tuple[int, int, Future[None] | None]]", progress: Progress) -> int:
    number, count, future = pending.popleft()
    if future is not None:
        result_of(future)
    progress.advance(count)
    return number


# In a worker process, the work that all tasks share.
_job: _Job | None = None


def _prepare(job: _Job) -> None:
    global _job
    _job = job


def _in_worker(number: int, rows: _Rows) -> None:
    assert _job is not None
    _convert_chunk(_job, number, rows)


def _convert_chunk(job: _Job, number: int, rows: _Rows) -> None:
    write_chunk(job.folder.path(number), _converted_chunk(job, rows))


def _converted_chunk(job: _Job, rows: _Rows) -> Chunk:
    chunk = Chunk(sums={"enlarged": 0})
    for row in rows:
        place, entry = row if isinstance(row, tuple) else (row, _entry(job, row))
        is_array = entry.name.lower().endswith(".npy")
        try:
            image = decode(entry.name, _bytes(job, entry), job.mode, job.conversion.background or "white")
            image, enlarged = _fitted(image, job.conversion, alpha=not is_array and len(image) in (2, 4))
        except UNREADABLE as error:
            damaged = Skipped(entry.name, str(error))
            if not job.skip_damaged:
                raise ValueError(damage_message([damaged], job.where)) from error
            chunk.skipped.append(damaged)
            continue
        suffix, data = _encoded(image, is_array)
        chunk.files[image_name(place, suffix)] = data
        chunk.labels.append(entry.label)
        chunk.sums["enlarged"] += enlarged
    return chunk


def _entry(job: _Job, row: int) -> Entry:
    assert job.catalog is not None
    label = -1 if job.catalog.labels is None else int(job.catalog.labels[row])
    return Entry(job.catalog.names[row], b"", label)


def _bytes(job: _Job, entry: Entry) -> bytes:
    return entry.data if job.catalog is None else job.catalog.storage.read(entry.name)


def _fitted(image: np.ndarray, conversion: Conversion, *, alpha: bool) -> tuple[np.ndarray, bool]:
    if conversion.size is None:
        return image, False
    enlarged = image.shape[1] < conversion.size[0] or image.shape[2] < conversion.size[1]
    function, lanczos = _METHODS[conversion.method], conversion.filter == "lanczos"
    return function(image, conversion.size, alpha=alpha, lanczos=lanczos), enlarged


def _encoded(image: np.ndarray, is_array: bool) -> tuple[str, bytes]:
    # In a PNG, the last of two or four channels would be opacity, which it need not be in an array.
    is_picture = image.dtype == np.uint8 and len(image) in ((1, 3) if is_array else (1, 2, 3, 4))
    suffix = ".png" if is_picture else ".npy"
    return suffix, encoded(image, suffix)


def _checked(
    catalog: Catalog, conversion: Conversion, skip_damaged: bool
) -> tuple[str, tuple[int, int] | None]:
    """The mode in which pictures are read ("auto" leaves each as it is), and the size of the results."""
    headers, damaged = read_headers(catalog)
    if damaged and not skip_damaged:
        raise ValueError(damage_message(damaged, catalog.where))
    kinds = Counter(h.dtype for h in headers.values())
    if len(kinds) > 1:
        shown = " and ".join(f"{count} of {kind}" for kind, count in kinds.items())
        raise ValueError(
            f"{catalog.where} holds images of bytes and of floats ({shown}): convert them separately"
        )
    sizes = {(h.height, h.width) for h in headers.values()}
    if conversion.size is None and len(sizes) > 1:
        raise ValueError(f"the images of {catalog.where} have {len(sizes)} different sizes: give --size")
    size = conversion.size or next(iter(sizes), None)
    modes = {h.mode for h in headers.values()} - {ARRAY, "F"}
    if conversion.mode != "auto" or not modes:
        return conversion.mode, size
    common = common_mode(modes)
    if conversion.background is not None:
        common = "L" if common in ("L", "LA") and not conversion.is_coloured else "RGB"
    return next((ours for ours, mode in _MODES.items() if mode == common), "auto"), size


def _packed(job: _Job, count: int, class_names: Sequence[str]) -> Made:
    if not job.skip_damaged:
        # The work may have begun with skip_damaged.
        for number in range(count):
            _refuse_skipped(job, [Skipped(*pair) for pair in job.folder.report(number)["skipped"]])
    return job.folder.pack(count, class_names)


def _checked_again(job: _Job, made: Made) -> Made:
    if not job.skip_damaged:
        _refuse_skipped(job, made.skipped)
    return made


def _refuse_skipped(job: _Job, skipped: list[Skipped]) -> None:
    if skipped:
        raise ValueError(damage_message(skipped, job.where))
