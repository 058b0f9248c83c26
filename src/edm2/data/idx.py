"""IDX files, the format of MNIST and its relatives."""

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edm2.data.dataset import ArrayDataset, check_split

_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}
_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?", re.IGNORECASE)
_PIECE = 1 << 24


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file, gzipped or not.

    Args:
        path: The file, gzipped if its name ends in `.gz`.

    Returns:
        The array in the file's shape and type, in this machine's byte order.

    Raises:
        ValueError: If the file is damaged or of another format.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            head = file.read(4)
            head += file.read(4 * head[3] if len(head) == 4 else 0)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or len(head) < 4 + 4 * head[3]:
                raise ValueError(
                    f"{path} is not an IDX file: it begins with {head[:4].hex(' ') or 'nothing'}"
                )
            shape = tuple(np.frombuffer(head[4:], ">u4").tolist())
            dtype = np.dtype(_TYPES[head[2]])
            promised = math.prod(shape) * dtype.itemsize
            # In pieces, because a forged header could promise more than fits into memory.
            pieces = iter(lambda: file.read(_PIECE), b"")
            data = b"".join(_up_to(promised + 1, pieces))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from error
    if len(data) != promised:
        found = "more" if len(data) > promised else f"{len(data)}"
        raise ValueError(
            f"{path} is damaged: its header promises {promised} bytes of data {list(shape)}, and there are "
            f"{found}: copy or download it again"
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _up_to(count: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    # Pieces until they hold at least that many bytes.
    while count > 0 and (piece := next(pieces, b"")):
        yield piece
        count -= len(piece)


def idx_splits(folder: Path) -> dict[str, dict[str, Path]]:
    """IDX files of a folder: `{"train": {"images": path, "labels": path}, "test": ...}`."""
    splits: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match:
            splits.setdefault(_SPLITS[match[1].lower()], {}).setdefault(match[2].lower(), path)
    return {split: files for split, files in splits.items() if "images" in files}


def open_idx(folder: Path, *, split: str, labels: bool, name: str | None = None) -> ArrayDataset:
    """Open one split of a folder of IDX files.

    Args:
        folder: Holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-...`, each also as `.gz`.
        split: "train" or "test" (the `t10k` files).
        labels: Whether to read labels.
        name: Name of the data set; the folder's by default.

    Returns:
        Images `[N, 1, H, W]` uint8 in memory.

    Raises:
        ValueError: If the split or a file is missing, damaged, or of other content.
    """
    splits = idx_splits(folder)
    check_split(split, splits, folder)
    files = splits[split]
    images = read_idx(files["images"])
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{files['images']} must hold [N, H, W] bytes, not {list(images.shape)} {images.dtype}"
        )
    if not labels:
        return ArrayDataset(images[:, None], name=name or folder.resolve().name)
    if "labels" not in files:
        raise ValueError(
            f"{files['images']} has no file of labels next to it: add {split}'s labels-idx1-ubyte, "
            "or open the data set without labels"
        )
    numbers = read_idx(files["labels"])
    if numbers.shape != images.shape[:1]:
        raise ValueError(
            f"{files['labels']} has {list(numbers.shape)} labels for {len(images)} images in "
            f"{files['images']}: take both from one release"
        )
    return ArrayDataset(images[:, None], numbers, name=name or folder.resolve().name)
