"""Tiny-ImageNet as published: `tiny-imagenet-200.zip`, or the folder in it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edm2.data.dataset import check_split
from edm2.data.pictures import is_image
from edm2.data.storage import Storage

_FOLDER = "tiny-imagenet-200/"
_SPLITS = ("train", "val", "test")
_MOST_BYTES = 1 << 24  # of a list; the longest that was published has 3 MB


class Split(NamedTuple):
    """Part of Tiny-ImageNet.

    Attributes:
        names: Names of its images in the archive.
        labels: `[N]` int64, or None.
        class_names: Name of each class; empty without labels.
    """

    names: list[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...]


def find_tiny_imagenet(storage: Storage, *, split: str, labels: bool, where: str) -> Split | None:
    """Find a split of Tiny-ImageNet; None if the files are something else.

    Classes are numbered by their sorted identifiers, and named by the first of their words.

    Args:
        storage: The files of the archive, or of the folder that was unpacked from it.
        split: "train"; "val", which is labelled, too; or "test", which has no labels.
        labels: Whether to read labels.
        where: The source, for messages.

    Raises:
        ValueError: If the split does not exist or has no labels, or the lists do not fit the images.
    """
    known = set(storage.names)
    top = next((top for top in ("", _FOLDER) if {f"{top}wnids.txt", f"{top}words.txt"} <= known), None)
    if top is None:
        return None
    check_split(split, _SPLITS, where)
    folder = f"{top}{split}/"
    names = [name for name in storage.names if name.startswith(folder) and is_image(name)]
    if not names:
        raise ValueError(f"{where} has no images in {folder}: unpack or download it again")
    if not labels:
        return Split(names, None, ())
    if split == "test":
        raise ValueError(
            f"the test images of {where} were published without labels: take the split val, or open them without labels"
        )
    classes = sorted(_lines(storage, f"{top}wnids.txt", where))
    words = dict(line.split("\t", 1) for line in _lines(storage, f"{top}words.txt", where) if "\t" in line)
    if split == "train":
        owners = [name.removeprefix(folder).split("/")[0] for name in names]
    else:
        rows = [line.split("\t") for line in _lines(storage, f"{folder}val_annotations.txt", where)]
        owner = {row[0]: row[1] for row in rows if len(row) > 1}
        owners = [owner.get(name.rsplit("/", 1)[1], "") for name in names]
    return Split(
        names,
        _numbers(owners, classes, names, where),
        tuple(words.get(identifier, identifier).split(",")[0] for identifier in classes),
    )


def _numbers(owners: Sequence[str], classes: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    number = {identifier: i for i, identifier in enumerate(classes)}
    for name, owner in zip(names, owners, strict=True):
        if owner not in number:
            raise ValueError(
                f"{name!r} of {where} belongs to no class of wnids.txt: unpack or download it again"
            )
    return np.array([number[owner] for owner in owners], np.int64)


def _lines(storage: Storage, name: str, where: str) -> list[str]:
    sizes = dict(zip(storage.names, storage.sizes, strict=True))
    try:
        if sizes[name] > _MOST_BYTES:
            raise ValueError(f"it has {sizes[name]:,} bytes")
        return [line.strip() for line in storage.read(name).decode().splitlines() if line.strip()]
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} of {where} cannot be read ({error}): unpack or download it again"
        ) from error
