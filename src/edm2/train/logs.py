"""The logs of a run: JSON lines, each with a checksum, so that one damaged line costs that line alone."""

import json
import os
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edm2.files import reason, remedy, sync_folder, write_atomic

LOG_FILE = "log.jsonl"
MAGNITUDES_FILE = "magnitudes.jsonl"
VALIDATION_FILE = "validation.jsonl"
_CHECK = "crc32"
_NUMBERS = ("learning_rate", "nonfinite_steps", "seconds", "images_per_second")
_TABLES = ("activations", "weights", "gradients", "updates")
_SEAM = re.compile(rb'(?<=[0-9]\}).(?=\{")')


def is_progress(record: dict[str, Any]) -> bool:
    """Whether a record of `log.jsonl` holds what pages about a run need."""
    means = (record.get(key, "") for key in ("loss", "grad_norm"))
    numbers = (record.get(key) for key in ("num_images", *_NUMBERS))
    return all(map(_is_number, numbers)) and all(x is None or _is_number(x) for x in means)


def is_magnitudes(record: dict[str, Any]) -> bool:
    """Whether a record of `magnitudes.jsonl` holds what pages about a run need."""
    tables = [record.get(kind) for kind in _TABLES]
    fits = all(isinstance(table, dict) and all(map(_is_number, table.values())) for table in tables)
    return fits and _is_number(record.get("num_images"))


def is_validation(record: dict[str, Any]) -> bool:
    """Whether a record of `validation.jsonl` holds what pages about a run, and its end, depend on."""
    numbers = (record.get(key) for key in ("num_images", "loss", "loss_ema", "sigma_rel"))
    lists = (record.get(key) for key in ("levels", "by_level", "by_level_ema"))
    return all(map(_is_number, numbers)) and all(
        isinstance(x, list) and all(map(_is_number, x)) for x in lists
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def read_log(
    run: Path, name: str = LOG_FILE, *, is_wanted: Callable[[dict[str, Any]], bool] = bool
) -> list[dict[str, Any]]:
    """Read the records of a log, in order.

    Lines that are not as they were written are left out, and a warning names them: a kill can cut the last one short.

    Args:
        run: Folder of the run.
        name: File name of the log.
        is_wanted: Called with a record; returns whether the caller can use it. Others are left out.

    Returns:
        The records; none where there is no such file.
    """
    path = run / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    records, damaged = [], []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
        # Where the line feed between two lines is damaged, both are still whole.
        parts = [_parse(part) for part in _SEAM.split(line)]
        good = [part for part in parts if part is not None and is_wanted(part)]
        records += good
        damaged += [str(number)] if len(good) < len(parts) else []
    if damaged:
        which = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {', '.join(damaged)} are"
        warnings.warn(f"{path}: {which} damaged and left out", stacklevel=2)
    return records


def append_log(run: Path, record: dict[str, Any], name: str = LOG_FILE) -> None:
    """Add a record to a log and flush it to the disk.

    Args:
        run: Folder of the run.
        record: JSON values; `num_images` says when.
        name: File name of the log.

    Raises:
        OSError: If it cannot be written.
    """
    path = run / name
    try:
        is_new = not path.exists()
        with open(path, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(run)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path} ({reason(error)}): checkpoints are untouched; {remedy(error)} and run the same "
            "command again",
        ) from error


def rewind_log(run: Path, num_images: int, name: str = LOG_FILE) -> None:
    """Drop the records after `num_images` images, which will be trained again, and damaged lines."""
    path = run / name
    if path.exists():
        content = b"".join(_line(r) for r in read_log(run, name) if r["num_images"] <= num_images)
        if content != path.read_bytes():
            write_atomic(path, content)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record)
    return f'{text[:-1]}, "{_CHECK}": {zlib.crc32(text.encode())}}}\n'.encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None unless the line is exactly what `_line` wrote."""
    try:
        record = json.loads(line)
        del record[_CHECK]
        is_whole = _line(record) == line + b"\n" and type(record["num_images"]) is int
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_whole else None
