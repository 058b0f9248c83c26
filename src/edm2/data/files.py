"""Data sets of encoded files, read one image at a time: folders, ZIPs, and any other `Storage`."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from edm2.data.dataset import NOT_FINITE, ImageDataset, Skipped
from edm2.data.labels import LABEL_FILE, VECTOR_FILE, read_labels, read_vectors
from edm2.data.pictures import (
    ARRAY,
    OTHER_PICTURES,
    PICTURES,
    UNREADABLE,
    Header,
    common_mode,
    decode,
    is_image,
    needs_whole,
    read_header,
)
from edm2.data.storage import FolderStorage, Storage, ZipStorage, zip_of
from edm2.data.tiny_imagenet import find_tiny_imagenet

_HEAD_BYTES = 4096
# How to leave damaged images out, in each command and in Python.
SKIP = "--skip-damaged (in training --dataset.skip-damaged, in Python skip_damaged=True)"


class Catalog(NamedTuple):
    """Encoded images and their labels, before any of them is read.

    Attributes:
        storage: The files.
        names: Names of the images among them.
        labels: `[N]` int64, one per name, or None.
        class_names: Name of each class, if known, else empty.
        where: The source, for messages.
        name: Short name for logs and reports.
        passed_over: Suffix -> number of files that are neither images nor labels.
    """

    storage: Storage
    names: Sequence[str]
    labels: np.ndarray | None
    class_names: Sequence[str]
    where: str
    name: str
    passed_over: Mapping[str, int] = MappingProxyType({})

    @property
    def sizes(self) -> list[int]:
        """Bytes of each image, in the order of the names."""
        sizes = dict(zip(self.storage.names, self.storage.sizes, strict=True))
        return [sizes[name] for name in self.names]

    def digest(self, rows: Iterable[int], settings: str = "") -> str:
        """sha256 of names, sizes, labels and checksums; see `checksum` of each storage for what it can miss.

        Args:
            rows: Positions of the images to include.
            settings: Anything else that makes sets different.
        """
        digest, sizes = hashlib.sha256(settings.encode()), self.sizes
        for row in rows:
            name = self.names[row]
            label = -1 if self.labels is None else self.labels[row]
            digest.update(f"\0{name}\0{sizes[row]}\0{label}\0{self.storage.checksum(name)}".encode())
        return digest.hexdigest()


class FileDataset(ImageDataset):
    """Pictures and arrays in files of one size.

    Pictures (PNG, JPEG, WebP, BMP, GIF, TIFF) become uint8 as a viewer would show them:

    - gray has 1 channel, gray with alpha 2, RGB 3, RGBA 4; black and white is gray; a palette, CMYK and
      YCbCr are RGB, or RGBA if the palette has transparency;
    - a set of several modes is read as RGB (gray and gray with alpha: as gray), transparent parts on white,
      with a warning that counts them;
    - images are turned upright if EXIF says so; the first frame of an animation is taken;
    - one band of 16-bit or float values becomes float32 with unchanged values; 16-bit colour is read with its upper
      8 bits, which is what Pillow can do.

    `.npy` files hold `[C, H, W]`, `[H, W]`, or `[H, W, C]` with up to 4 channels: uint8, or any float or 16-bit
    values, which become float32 unchanged. Opening reads the header of every image, not its pixels.

    Args:
        catalog: The files.
        skip_damaged: Whether to leave out images whose header is damaged; otherwise they are errors.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: If images are damaged or of different sizes, or `vectors.csv` does not fit them.
    """

    def __init__(self, catalog: Catalog, *, skip_damaged: bool = False, missing: bool = False) -> None:
        self._storage, self._where = catalog.storage, catalog.where
        warn_passed_over(catalog)
        headers, damaged = read_headers(catalog)
        if damaged and not skip_damaged:
            raise ValueError(damage_message(damaged, self._where))
        rows = [row for row, name in enumerate(catalog.names) if name in headers]
        if not rows:
            raise ValueError(
                f"none of the {len(catalog.names)} images of {self._where} can be read, the first because "
                f"{damaged[0].reason}"
            )
        self._names = [catalog.names[row] for row in rows]
        self._mode, shape = _common_shape(headers, self._where)
        labels = catalog.labels
        vectors = read_vectors(self._storage, self._names, source=Path(self._where))
        fingerprint = catalog.digest(rows, f"files {shape}")
        if vectors is not None:
            fingerprint = hashlib.sha256(fingerprint.encode() + vectors.astype("<f4").tobytes()).hexdigest()
        super().__init__(
            name=catalog.name,
            image_shape=shape[:3],
            dtype=np.dtype(shape[3]),
            labels=None if labels is None else labels[rows],
            num_classes=len(catalog.class_names) or (None if labels is None else int(labels.max()) + 1),
            class_names=catalog.class_names,
            fingerprint=fingerprint,
            size=len(rows),
            skipped=damaged,
            vectors=vectors,
            missing=missing and shape[3] == "float32",
        )

    def image_name(self, index: int) -> str:
        """File name of an image."""
        return self._names[index]

    def _read(self, indices: np.ndarray) -> np.ndarray:
        batch = np.empty((len(indices), *self.image_shape), self.dtype)
        for row, index in enumerate(indices):
            name = self._names[index]
            try:
                image = decode(name, self._storage.read(name), self._mode, missing=self.missing)
                if image.shape != self.image_shape or image.dtype != self.dtype:
                    raise ValueError(f"it was {self.image_shape} at opening, and is {image.shape} now")
            except UNREADABLE as error:
                raise ValueError(damage_message([Skipped(name, str(error))], self._where)) from error
            batch[row] = image
        return batch


def list_files(source: Path, *, split: str = "train", labels: bool = True) -> Catalog:
    """Find the images of a folder, or of a ZIP with the same layout.

    Of Tiny-ImageNet as published, a split is found. Elsewhere labels come from `dataset.json` at the top,
    `{"labels": [[name, int], ...]}` or null; without it, the sorted top folders are the classes.

    Args:
        source: Folder, ZIP, or folder inside a ZIP such as `data.zip/photos`.
        split: Which part of Tiny-ImageNet; other sources have only "train".
        labels: Whether to read labels.

    Raises:
        ValueError: If there are no images, the split does not exist, or labels do not fit.
    """
    archive = zip_of(source)
    storage: Storage = FolderStorage(source) if archive is None else ZipStorage(*archive)
    published = find_tiny_imagenet(storage, split=split, labels=labels, where=str(source))
    if published is not None:
        return Catalog(storage, *published, str(source), "tiny-imagenet")
    if split != "train":
        raise no_splits(source, split)
    names = [name for name in storage.names if is_image(name)]
    if not names:
        raise ValueError(
            f"{source} holds no images ({len(storage.names)} files, none of them "
            f"{', '.join(PICTURES)} or .npy): give the folder or ZIP that holds them"
        )
    strange = next((name for name in names if not _is_unicode(name)), None)
    if strange is not None:
        raise ValueError(f"the file name {strange!r} in {source} is not UTF-8: rename it")
    values, class_names = read_labels(storage, names, source=source) if labels else (None, ())
    others = Counter(
        _suffix(name)
        for name in storage.names
        if not is_image(name) and name not in (LABEL_FILE, VECTOR_FILE)
    )
    return Catalog(storage, names, values, class_names, str(source), source.resolve().stem, others)


def no_splits(source: Path, split: str) -> ValueError:
    """The error for a split of a source that has none."""
    return ValueError(
        f"{source} has no split {split!r}: an image folder, ZIP or array has only the split 'train'; "
        "open the other by its own path"
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or "no suffix"


def unread_pictures(catalog: Catalog) -> str | None:
    """How many files are pictures by their suffix, but are not read; None if there are none."""
    counts = {suffix: n for suffix, n in catalog.passed_over.items() if suffix in OTHER_PICTURES}
    if not counts:
        return None
    shown = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} pictures in formats that are not read ({shown})"


def warn_passed_over(catalog: Catalog) -> None:
    """Warn of pictures that are left out because of their format."""
    if found := unread_pictures(catalog):
        warnings.warn(
            f"{catalog.where} has {found}: convert them to PNG or JPEG to include them", stacklevel=4
        )


def read_headers(catalog: Catalog) -> tuple[dict[str, Header], list[Skipped]]:
    """Read the headers of images, by name; and list the images that cannot be read."""
    headers: dict[str, Header] = {}
    damaged = []
    for name, size in zip(catalog.names, catalog.sizes, strict=True):
        try:
            headers[name] = _header(catalog.storage, name, size)
        except UNREADABLE as error:
            damaged.append(Skipped(name, str(error)))
    return headers, damaged


def damage_message(damaged: Sequence[Skipped], where: str) -> str:
    """Text of an error: which image cannot be read, why, and what to do."""
    name, reason = damaged[0]
    others = "" if len(damaged) == 1 else f", and {len(damaged) - 1} more"
    if NOT_FINITE in reason:  # which says what to do
        return f"{name!r} of {where} cannot be used{others}: {reason}"
    return (
        f"image {name!r} in {where} cannot be read ({reason}){others}: "
        f"replace it, remove it (and its line in {LABEL_FILE}), or leave it out with {SKIP}"
    )


def _header(storage: Storage, name: str, size: int) -> Header:
    # Sizes in tables are unknown until their rows are read.
    known = size or None
    head = storage.read(name, _HEAD_BYTES)
    if not needs_whole(head):
        try:
            return read_header(name, head, size=known)
        except ValueError:
            if len(head) < _HEAD_BYTES:
                raise
    # A long header, such as a camera's, needs the whole file.
    return read_header(name, storage.read(name), size=known)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _common_shape(headers: dict[str, Header], where: str) -> tuple[str | None, tuple[int, int, int, str]]:
    """The mode to read pictures in; channels, height, width and type of every image."""
    modes = Counter(header.mode for header in headers.values())
    mode = None
    if not modes.keys() & {ARRAY, "F"}:
        mode = common_mode(modes)
        headers = {n: h._replace(channels=len(mode), mode=mode) for n, h in headers.items()}
    sizes = Counter((h.channels, h.height, h.width, h.dtype) for h in headers.values())
    common = sizes.most_common(1)[0][0]
    if len(sizes) > 1:
        wrong = [n for n, h in headers.items() if (h.channels, h.height, h.width, h.dtype) != common]
        right = next(h for h in headers.values() if (h.channels, h.height, h.width, h.dtype) == common)
        shown = ", ".join(f"{n!r} is {headers[n].words()}" for n in wrong[:3])
        raise ValueError(
            f"the images of {where} have mixed sizes: {sizes[common]} are {right.words()}, but "
            f"{shown}{' ...' if len(wrong) > 3 else ''} ({len(wrong)} in all): remove them, or bring all "
            f"to one size with 'edm2 data convert {where} --out NEW.zip --size N'"
        )
    if mode is not None and len(modes) > 1:
        counted = ", ".join(f"{count} {name}" for name, count in modes.most_common())
        warnings.warn(
            f"the pictures of {where} are of several modes ({counted}): read as {mode}", stacklevel=5
        )
    return mode, common
