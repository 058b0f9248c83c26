"""Whether the files of a snapshot folder are as they were written."""

from collections.abc import Iterator
from pathlib import Path

from edm2.ema.storage.manifest import Manifest, Snapshot
from edm2.ema.storage.replacing import sha256_of
from edm2.ema.storage.snapshots import open_snapshot


def damaged(folder: Path, manifest: Manifest, *, read: bool = True) -> Iterator[str]:
    """Compare every file with the manifest.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        manifest: Its content.
        read: Whether to read all data and compare its sha256. False compares sizes and headers, in milliseconds.

    Yields:
        One message for each damaged file, naming it.
    """
    for snapshot in manifest.snapshots:
        if problem := _problem(folder, manifest, snapshot, read=read):
            yield problem


def _problem(folder: Path, manifest: Manifest, snapshot: Snapshot, *, read: bool) -> str | None:
    try:
        path = open_snapshot(folder, manifest.run, snapshot).path
        if read and sha256_of(path) != snapshot.sha256:
            return f"{path} is damaged: its sha256 is not the one written; restore it from a copy"
    except FileNotFoundError as error:
        return f"{error.filename} is named by the manifest but missing: restore it from a copy"
    except (ValueError, OSError) as error:
        return str(error)
    return None
