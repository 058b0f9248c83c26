"""Class labels of an image folder or ZIP: from `dataset.json`, else from the names of the folders.

`edm2 data convert` adds `"class_names": [name, ...]` to `dataset.json` if they are known.
"""

import csv
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edm2.data.dataset import MAX_CLASSES, TOO_MANY_CLASSES
from edm2.data.pairs import checked_vectors
from edm2.data.storage import Storage, plain_name

LABEL_FILE = "dataset.json"
VECTOR_FILE = "vectors.csv"
_LABEL_BYTES = 1000  # most of an image's entry
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def read_labels(
    storage: Storage, names: Sequence[str], *, source: Path
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Find the label of every image.

    Args:
        storage: The files.
        names: Names of the images among them.
        source: Path for messages.

    Returns:
        Labels `[N]` int64 or None; class names, if folders or the file give them.

    Raises:
        ValueError: If the label file does not fit the images, or the folders are not classes.
    """
    if LABEL_FILE in storage.names:
        size, most = storage.sizes[storage.names.index(LABEL_FILE)], _LABEL_BYTES * (1000 + len(names))
        if size > most:  # a ZIP of kilobytes can hold gigabytes
            raise ValueError(
                f"{source / LABEL_FILE} has {size:,} bytes, more than the labels of {len(names):,} images take: "
                "write it again with one entry per image"
            )
        return _from_json(storage.read(LABEL_FILE), names, where=source / LABEL_FILE)
    misplaced = [name for name in storage.names if name.endswith("/" + LABEL_FILE)]
    if misplaced:
        raise ValueError(
            f"the label file of {source} is {misplaced[0]!r}, but must be at the top: open "
            f"{source / misplaced[0].removesuffix('/' + LABEL_FILE)} instead"
        )
    return _from_folders(names, source=source)


def read_vectors(storage: Storage, names: Sequence[str], *, source: Path) -> np.ndarray | None:
    """Find the vector of every image in `vectors.csv`: a line of names of columns, then image, number, number, ...

    Args:
        storage: The files.
        names: Names of the images among them; in the file their suffix may be left out.
        source: Path for messages.

    Returns:
        Vectors `[N, D]` float32, or None without the file.

    Raises:
        ValueError: If the file does not fit the images.
    """
    if VECTOR_FILE not in storage.names:
        return None
    where = source / VECTOR_FILE
    size, most = storage.sizes[storage.names.index(VECTOR_FILE)], _LABEL_BYTES * (1000 + len(names))
    if size > most:
        raise ValueError(
            f"{where} has {size:,} bytes, more than the vectors of {len(names):,} images take: write one line per image"
        )
    wanted = f"{where} must hold a line such as 'image,hour,lead', then one for each image: 'a.png,6,1.5'"
    try:
        header, *lines = [
            line for line in csv.reader(io.StringIO(storage.read(VECTOR_FILE).decode())) if line
        ]
        table = {plain_name(line[0]): [float(number) for number in line[1:]] for line in lines}
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{wanted}; it cannot be read ({error})") from error
    if (
        len(table) < len(lines)
        or len(header) < 2
        or any(len(row) != len(header) - 1 for row in table.values())
    ):
        raise ValueError(f"{wanted}; lines have different lengths, or an image has two")
    found = [table.get(name, table.get(name.rpartition(".")[0])) for name in names]
    missing = [name for name, row in zip(names, found, strict=True) if row is None]
    if missing:
        raise ValueError(f"{where} has no line for {some(missing)}: add it, or remove the images")
    return checked_vectors(np.array(found), len(names))


def _from_json(
    data: bytes, names: Sequence[str], *, where: Path
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    wanted = f'{where} must hold {{"labels": [["folder/name.png", 3], ...]}}, or null in place of the list'
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}; it is not JSON ({error})") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f"{wanted}; it has no 'labels'")
    if content["labels"] is None:
        return None, ()
    if not isinstance(content["labels"], list):
        raise ValueError(f"{wanted}; 'labels' is a {type(content['labels']).__name__}")
    table: dict[str, int] = {}
    for entry in content["labels"]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{wanted}; an entry is {str(entry)[:80]}")
        name, label = plain_name(entry[0]), entry[1]
        if type(label) is not int or label < 0:
            raise ValueError(
                f"{where}: the label of {name!r} is {label!r:.80}, but must be a whole number from 0"
            )
        if label >= MAX_CLASSES:
            raise ValueError(
                f"{where}: the label of {name!r} is {str(label)[:40]}, too large: {TOO_MANY_CLASSES}"
            )
        if table.setdefault(name, label) != label:
            raise ValueError(f"{where}: {name!r} has two labels, {table[name]} and {label}: keep one")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"{where} has no label for {some(missing)}: add them, or open the data set without labels"
        )
    absent = sorted(table.keys() - set(names))
    if absent:
        raise ValueError(
            f"{where} has labels for {some(absent)}, which do not exist: add the images, or remove the labels"
        )
    classes = content.get("class_names", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{where}: 'class_names' must be a list of names, one per class")
    if classes and max(table.values()) >= len(classes):
        raise ValueError(
            f"{where}: label {max(table.values())} has no name among the {len(classes)} 'class_names'"
        )
    return np.array([table[name] for name in names], dtype=np.int64), tuple(classes)


def _from_folders(names: Sequence[str], *, source: Path) -> tuple[np.ndarray | None, tuple[str, ...]]:
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return None, ()
    if loose:
        raise ValueError(
            f"{source} has class folders, but {some(loose)} outside them: move every image into a folder, "
            f"write a {LABEL_FILE}, or open the data set without labels"
        )
    tops = [name.split("/", 1)[0] for name in names]
    classes = tuple(sorted(set(tops)))
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"the top folders of {source} are {', '.join(classes)}: these look like splits, not classes; "
            f"open one of them, such as {source / classes[0]}, or open the data set without labels"
        )
    if len(classes) == 1:
        warnings.warn(
            f"all images of {source} are in one folder, {classes[0]!r}, so there is one class: open "
            f"{source / classes[0]} if its subfolders are the classes",
            stacklevel=5,
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[top] for top in tops], dtype=np.int64), classes


def some(names: Sequence[str]) -> str:
    """Up to three names in words, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} images, such as {shown}" if len(names) > 3 else shown
