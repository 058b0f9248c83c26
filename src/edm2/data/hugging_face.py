"""Data sets of the Hugging Face library `datasets`: saved folders, Arrow and Parquet files, the hub, streams."""

import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edm2.data.dataset import check_split, checked_labels
from edm2.data.files import Catalog
from edm2.data.pictures import encoded
from edm2.data.storage import file_checksum
from edm2.extras import need

PREFIX = "hf://"
_TABLES = (".arrow", ".parquet")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


class Entry(NamedTuple):
    """One image: its name, encoded bytes, and label (-1 for none)."""

    name: str
    data: bytes
    label: int


class Stream(NamedTuple):
    """A data set that is read from beginning to end.

    Attributes:
        entries: The remaining images.
        class_names: Name of each class, if known, else empty.
        num_images: Number of images in the whole data set, if its description says, else None.
    """

    entries: Iterator[Entry]
    class_names: tuple[str, ...]
    num_images: int | None


class _Columns(NamedTuple):
    image: str
    is_array: bool
    label: str | None
    class_names: tuple[str, ...]
    has_words: bool


class TableStorage:
    """The image column of a table as files named after their rows.

    Args:
        table: A `datasets.Dataset`.
        columns: Columns to read.
    """

    def __init__(self, table: Any, columns: _Columns) -> None:
        self._table, self._columns = table, columns
        suffix = ".npy" if columns.is_array else ""
        self.names = [f"row {row:09d}{suffix}" for row in range(len(table))]
        self.sizes, self._checksums = [0] * len(table), np.zeros(0, np.uint32)
        if not columns.is_array:
            rows = table.with_format("arrow").select_columns([columns.image]).iter(1000)
            found = [_measured(value) for batch in rows for value in batch[columns.image].to_pylist()]
            self.sizes = [size for size, _ in found]
            self._checksums = np.array([checksum for _, checksum in found], np.uint32)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The image's bytes, or the first `limit` of them."""
        value = self._table[int(name[4:13])][self._columns.image]
        return _encoded(value, self._columns.is_array)[:limit]

    def checksum(self, name: str) -> int:
        """CRC-32 of the stored image; see `edm2.data.storage.file_checksum` for files that the table names."""
        if self._columns.is_array:
            return zlib.crc32(self.read(name))
        return int(self._checksums[int(name[4:13])])


def is_hugging_face(path: Path) -> bool:
    """Whether a path is a folder saved by `datasets`, an Arrow or Parquet file, or a folder of such files."""
    if path.is_file():
        return path.suffix.lower() in _TABLES
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return True
    return bool(_table_files(path))


def list_hugging_face(source: str | Path, *, split: str = "train", labels: bool = True) -> Catalog:
    """Find the images of a data set of the library `datasets`, for random access.

    Args:
        source: `hf://NAME`, `hf://NAME:CONFIG`, each also with `@REVISION` at the end, which downloads to the
            library's cache; or a path: a folder written by `save_to_disk`, an `.arrow` or `.parquet` file, or a
            folder of such files, whose splits are those named `SPLIT-...`.
        split: Name of the split.
        labels: Whether to read labels: the first column of class labels, or a column named label, labels, fine_label
            or class that holds whole numbers, booleans or words. The sorted words are the classes.

    Raises:
        ValueError: If `datasets` is not installed, cannot open the source, or it has no such split or no images.
    """
    table = _load(source, split, streaming=False)
    columns = _find_columns(table.features, str(source))
    table = _raw(table, columns)
    storage = TableStorage(table, columns)
    values, class_names = _labels(table, columns, str(source)) if labels else (None, ())
    name = str(source).rstrip("/").split("/")[-1]
    return Catalog(storage, storage.names, values, class_names, str(source), name)


def _labels(table: Any, columns: _Columns, source: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if columns.label is None:
        return None, ()
    found = table.with_format("arrow")[columns.label][:].to_pylist()
    if None in found:
        raise ValueError(_no_label(source, columns.label, found.index(None)))
    if columns.has_words:
        class_names = tuple(sorted(set(found)))
        number = {word: i for i, word in enumerate(class_names)}
        return checked_labels(np.array([number[word] for word in found]), len(found)), class_names
    values = np.asarray(found, dtype=np.int64)
    if values.min() < 0:
        # The hub marks secret labels of test splits this way.
        raise ValueError(
            f"{source} has label {values.min()} in column {columns.label!r}: open it without labels"
        )
    return checked_labels(values, len(found)), columns.class_names


def _no_label(source: str | Path, column: str, row: int) -> str:
    return (
        f"row {row} of {source} has no label in column {column!r}: add it, remove the row, or open the data set "
        "without labels"
    )


def stream_hugging_face(source: str | Path, *, split: str = "train", start: int = 0) -> Stream:
    """Read a data set from beginning to end without storing it.

    Training needs random access, so a stream is for `edm2 data convert`.

    Args:
        source: See `list_hugging_face`; folders written by `save_to_disk` cannot be streamed.
        split: Name of the split.
        start: Number of images to skip.

    Raises:
        ValueError: As in `list_hugging_face`.
    """
    stream = _load(source, split, streaming=True)
    if stream.features is None:
        stream = stream._resolve_features()
    columns = _find_columns(stream.features, str(source))
    if columns.has_words:
        raise ValueError(
            f"the labels of {source} are words (column {columns.label!r}), and a stream does not list their "
            "classes: leave streaming out, or cast the column to datasets.ClassLabel"
        )
    known = (stream.info.splits or {}).get(split)
    entries = _entries(_raw(stream, columns).skip(start), columns, start, source)
    return Stream(entries, columns.class_names, known.num_examples if known else None)


def _entries(stream: Any, columns: _Columns, start: int, source: str | Path) -> Iterator[Entry]:
    suffix = ".npy" if columns.is_array else ""
    for row, content in enumerate(stream, start):
        label = -1
        if columns.label is not None:
            if content[columns.label] is None:
                raise ValueError(_no_label(source, columns.label, row))
            label = int(content[columns.label])
        yield Entry(f"row {row:09d}{suffix}", _encoded(content[columns.image], columns.is_array), label)


def _load(source: str | Path, split: str, *, streaming: bool) -> Any:
    library = need("datasets", f"{source}")
    if str(source).startswith(PREFIX):
        name, _, revision = str(source)[len(PREFIX) :].partition("@")
        name, _, config = name.partition(":")
        return _asked(
            source,
            library.load_dataset,
            name,
            config or None,
            split=split,
            revision=revision or None,
            streaming=streaming,
        )
    path = Path(source)
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        if streaming:
            raise ValueError(
                f"{path} was written by save_to_disk and cannot be streamed: leave streaming out"
            )
        return _pick(_asked(source, library.load_from_disk, str(path)), split, path)
    files = [path] if path.is_file() else _of_one_kind(_table_files(path), path)
    chosen = [str(file) for file in _of_split(files, split, path)]
    kind = files[0].suffix[1:].lower()
    return _asked(
        source, library.load_dataset, kind, data_files={split: chosen}, split=split, streaming=streaming
    )


def _asked(source: str | Path, function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:
        # The library raises dozens of kinds of errors: no network, no such name, a damaged file, a gated data set.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"the library 'datasets' could not open {source} ({reason}): check the "
            "name, the split, the network and, for a gated data set, your login"
        ) from error


def _pick(loaded: Any, split: str, path: Path) -> Any:
    if not isinstance(loaded, dict):
        check_split(split, ["train"], path)
        return loaded
    check_split(split, loaded, path)
    return loaded[split]


def _table_files(folder: Path) -> list[Path]:
    # At the top or in "data", as in a snapshot of the hub. Looking further would list all of an image folder.
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    return sorted(
        Path(entry.path)
        for place in places
        for entry in os.scandir(place)
        if entry.name.lower().endswith(_TABLES)
    )


def _of_one_kind(files: list[Path], folder: Path) -> list[Path]:
    chosen = [file for file in files if file.suffix == files[-1].suffix]
    if len(chosen) < len(files):
        _warn(
            f"{folder} holds tables of two kinds: only the {len(chosen)} that end in {chosen[0].suffix} are read, not "
            f"the other {len(files) - len(chosen)}"
        )
    return chosen


def _of_split(files: list[Path], split: str, path: Path) -> list[Path]:
    known = {"train", "test", "validation", "valid", "val"}
    named = {file: file.name.split("-")[0].split(".")[0] for file in files}
    splits = sorted({name for name in named.values() if name in known})
    if not splits and split == "train":
        return files
    chosen = [file for file in files if named[file] == split]
    unnamed = [file for file in files if named[file] not in known]
    if unnamed:
        _warn(
            f"{len(unnamed)} files of {path}, such as {unnamed[0].name}, are not read, because their names do not "
            "begin with a split"
        )
    if not chosen:
        check_split(split, splits or ["train"], path)
    return chosen


def _find_columns(features: Any, source: str) -> _Columns:
    library = need("datasets")
    pictures = [
        name for name, kind in features.items() if isinstance(kind, library.Image) or _is_encoded(kind)
    ]
    arrays = [name for name, kind in features.items() if isinstance(kind, (library.Array2D, library.Array3D))]
    if not pictures + arrays:
        raise ValueError(
            f"{source} has no column of images (its columns: {', '.join(features)}): cast one to datasets.Image() "
            "or datasets.Array3D"
        )
    preferred = [name for name in pictures + arrays if name in ("image", "img")]
    image = (preferred + pictures + arrays)[0]
    if len(pictures + arrays) > 1 and not preferred:
        _warn(f"{source} has several columns of images ({', '.join(pictures + arrays)}): {image!r} is read")
    classes = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    kinds = {
        name: features[name].dtype for name in _LABEL_COLUMNS if isinstance(features.get(name), library.Value)
    }
    whole = [name for name, kind in kinds.items() if "int" in kind or kind == "bool"]
    words = [name for name, kind in kinds.items() if "string" in kind]
    label = next(iter([name for name in _LABEL_COLUMNS if name in classes] + classes + whole + words), None)
    others = [name for name in dict.fromkeys([*classes, *whole, *words]) if name != label]
    if others and label not in ("label", "labels"):
        _warn(f"{source} has several columns of labels ({label}, {', '.join(others)}): {label!r} is read")
    if label is None and (unused := [name for name in _LABEL_COLUMNS if name in features]):
        _warn(
            f"column {unused[0]!r} of {source} is not read as labels, because it holds neither classes, whole numbers "
            "nor words: cast it to datasets.ClassLabel"
        )
    names = tuple(features[label].names) if label in classes else ()
    return _Columns(image, image in arrays, label, names, label in words)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)


def _is_encoded(kind: Any) -> bool:
    # Parquet files of other tools hold encoded bytes, bare or in a struct {bytes, path}.
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _raw(table: Any, columns: _Columns) -> Any:
    kept = [columns.image] + ([columns.label] if columns.label else [])
    table = table.select_columns(kept)
    if isinstance(table.features[columns.image], need("datasets").Image):
        table = table.cast_column(columns.image, need("datasets").Image(decode=False))
    return table


def _encoded(value: Any, is_array: bool) -> bytes:
    if is_array:
        return encoded(np.asarray(value), ".npy")
    if isinstance(value, dict) and value["bytes"] is None and value["path"] is not None:
        return Path(value["path"]).read_bytes()
    data: bytes | None = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise ValueError("the row holds no image")
    return data


def _measured(value: Any) -> tuple[int, int]:
    # Size and checksum of an encoded image; (0, 0) if it is missing.
    if isinstance(value, dict) and value["bytes"] is None and value["path"] is not None:
        path = Path(value["path"])
        return (path.stat().st_size, file_checksum(path)) if path.is_file() else (0, 0)
    data = (value["bytes"] if isinstance(value, dict) else value) or b""
    return len(data), zlib.crc32(data)
