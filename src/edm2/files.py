"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edm2.ema.storage.guarded_json import Range, from_json, read_json
from edm2.ema.storage.replacing import (
    folder_lock,
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
    "Range",
    "check_seal",
    "claimed",
    "from_json",
    "make_folder",
    "read_json",
    "read_sealed",
    "reason",
    "remedy",
    "remove_folder",
    "replacing",
    "replacing_folder",
    "sealed",
    "sha256_of",
    "sync_folder",
    "write_atomic",
    "write_json",
    "write_sealed",
]

_SEAL = "sha256"


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


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write JSON atomically together with a checksum of its content; `read_sealed` checks it."""
    write_json(path, sealed(content))


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values together with a checksum, for `check_seal`."""
    return {**content, _SEAL: _digest(content)}


def check_seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return what `sealed` was given, or values without a checksum as they are.

    Raises:
        ValueError: If the values are not those that were sealed.
    """
    values = {key: value for key, value in content.items() if key != _SEAL}
    if content.get(_SEAL, "") not in ("", _digest(values)):
        raise ValueError(f'its checksum differs; after an edit by hand, remove the line "{_SEAL}"')
    return values


def read_sealed(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """Read what `write_sealed` wrote. A file without a checksum is accepted, so that people can edit it.

    Args:
        path: The file.
        finite: As in `read_json`.

    Returns:
        The content without its checksum.

    Raises:
        ValueError: If it is not a JSON object, or not as it was written. The message gives the reason only: callers
            name the file.
        OSError: If the file cannot be read.
    """
    content = read_json(Path(path), finite=finite)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return check_seal(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
