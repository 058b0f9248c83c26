"""Files that are either whole or not there: write aside, flush to the disk, rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from edm2.ema.storage.guarded_json import read_json as read_json


def write_atomic(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> Path:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part.

    Args:
        path: file to write or replace; its folder is made where missing.
        content: all of it.
        durable: also survive a power cut; costs milliseconds a file.

    Returns:
        The file written.

    Raises:
        OSError: where it cannot be written, as on a full disk; the old content is still there then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"could not write {path} ({error.strerror}): what it held is untouched"
        ) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
    return path


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys, so that equal contents are equal bytes."""
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries, so that renames inside it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """Hash of a whole file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
