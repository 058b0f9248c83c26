"""Whether the files of a folder of snapshots are as they were written."""

from collections.abc import Iterator
from pathlib import Path

from edm2.ema.storage.replacing import sha256_of
from edm2.ema.storage.snapshots import Manifest, open_snapshot


def damaged(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Read every file and compare it with what the manifest says.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        manifest: Its content.

    Yields:
        What is wrong, naming the file; nothing where all is well.
    """
    for snapshot in manifest.snapshots:
        try:
            path = open_snapshot(folder, manifest.run, snapshot).path
            if sha256_of(path) != snapshot.sha256:
                yield f"{path} is damaged: its sha256 is not the one written; restore it from a copy"
        except (ValueError, OSError) as error:
            yield str(error)
