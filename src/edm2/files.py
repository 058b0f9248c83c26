"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import json
import os
from pathlib import Path
from typing import Any

from edm2.ema.storage.guarded_json import read_json
from edm2.ema.storage.replacing import (
    make_folder,
    reason,
    remedy,
    remove_folder,
    replacing,
    replacing_folder,
    sha256_of,
    sync_folder,
)

__all__ = [
    "make_folder",
    "read_json",
    "reason",
    "remedy",
    "remove_folder",
    "replacing",
    "replacing_folder",
    "sha256_of",
    "sync_folder",
    "write_atomic",
    "write_json",
]


def write_atomic(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> Path:
    """Write all of a file's content at once; see `replacing`.

    Returns:
        The file written.
    """
    with replacing(path, durable=durable) as file:
        file.write(content)
    return Path(path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON atomically, with sorted keys, so that equal contents are equal bytes."""
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
