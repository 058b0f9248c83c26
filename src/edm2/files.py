"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edm2.ema.storage.guarded_json import read_json
from edm2.ema.storage.locking import folder_lock
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
    "claimed",
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


@contextlib.contextmanager
def claimed(folder: Path, output: Path) -> Iterator[None]:
    """Hold a folder of unfinished work, so that two processes never write one output; it is made if missing.

    Args:
        folder: Folder of the work.
        output: What the work makes, for the message.

    Raises:
        ValueError: If another process holds it.
    """
    with contextlib.ExitStack() as stack:
        held = False
        while not held:
            make_folder(folder)
            try:
                # Missing again, if another process finished and removed it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(folder_lock(folder, wait=False))
                    held = True
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing {output}: wait until it is done, or choose another --out"
                ) from None
        yield
