"""Work on a data set in chunks, which survive interruptions and are packed into a folder or ZIP at the end.

During the work, `DEST.partial` holds one ZIP for each chunk. DEST appears when it is whole. Its bytes do not depend on
the number of workers or on interruptions.
"""

import hashlib
import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edm2.data.dataset import Skipped
from edm2.data.labels import LABEL_FILE, VECTOR_FILE
from edm2.files import claimed, read_json, replacing, replacing_folder, write_atomic, write_json

_REPORT = "report.json"
_SETTINGS = "settings.json"
_NOTE = "made_by_edm2"  # in the label file: how the data set was made
# The earliest date that a ZIP can hold; real dates would make equal contents differ.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass
class Chunk:
    """The result of a chunk: files by name, their labels, and what happened.

    Attributes:
        files: Name -> bytes.
        labels: Labels of the files, in their order; -1 for none.
        skipped: Images that were left out.
        sums: Numbers to add up over all chunks.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    sums: dict[str, Any] = field(default_factory=dict)


def image_name(number: int, suffix: str) -> str:
    """Name of an image in the official layout: `00012/img00012345.png`."""
    digits = f"{number:08d}"
    return f"{digits[:5]}/img{digits}{suffix}"


class Made(NamedTuple):
    """A finished data set.

    Attributes:
        path: Folder or ZIP.
        num_images: Number of images in it.
        skipped: Images that were left out because they cannot be read.
        sums: Sums over all chunks.
    """

    path: Path
    num_images: int
    skipped: list[Skipped]
    sums: dict[str, Any]

    @property
    def enlarged(self) -> int:
        """Number of images that were smaller than the new size."""
        return int(self.sums.get("enlarged", 0))


class ChunkFolder:
    """The chunks of one piece of work; `begin` makes it.

    Args:
        dest: Folder or `.zip` to be made.
        settings: What determines the result, as JSON values.
    """

    def __init__(self, dest: Path, settings: dict[str, Any]) -> None:
        self.dest, self.folder = dest, dest.with_name(f"{dest.name}.partial")
        self.settings = json.loads(json.dumps(settings))

    def claim(self) -> None:
        """Note the settings, or check that work begun here had the same.

        Raises:
            ValueError: If work of other settings was begun.
        """
        kept = self.folder / _SETTINGS
        if not kept.exists():
            write_json(kept, self.settings)
            return
        try:
            before = dict(read_json(kept))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{kept} is damaged ({error}): delete {self.folder}, or choose another --out"
            ) from error
        changed = sorted(key for key in self.settings | before if before.get(key) != self.settings.get(key))
        if changed:
            shown = ", ".join(
                f"{key} was {before.get(key)!s:.40}, is {self.settings.get(key)!s:.40}" for key in changed
            )
            raise ValueError(
                f"{self.folder} holds unfinished work with other settings ({shown}): delete it, or choose another --out"
            )

    def finished(self) -> Made | None:
        """The data set, if work with these settings finished before; what was left of the work is removed.

        Raises:
            ValueError: If anything else lies at the destination.
        """
        if not self.dest.exists():
            return None
        try:
            noted = _label_file(self.dest)[_NOTE]
            if noted["settings"] != self._digest():
                raise ValueError("it was made with other settings")
            made = Made(
                self.dest, noted["images"], [Skipped(*pair) for pair in noted["skipped"]], noted["sums"]
            )
        except Exception:  # zipfile and json raise errors of many types for other and damaged files
            with suppress(OSError):  # as `begin` made it when another process had just finished
                self.folder.rmdir()
            raise ValueError(f"{self.dest} exists already: choose another --out, or delete it") from None
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return made

    def _digest(self) -> str:
        # Not of the source's path, so that equal sources give equal bytes wherever they lie.
        settings = {key: value for key, value in self.settings.items() if key != "source"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, number: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{number:06d}.zip"

    def is_done(self, number: int) -> bool:
        """Whether a chunk exists and is whole; a damaged one counts as missing, with a warning."""
        path = self.path(number)
        if not path.exists():
            return False
        try:
            # The table of contents lies at the end, so an incomplete file has none.
            self.report(number)
        except ValueError as error:
            warnings.warn(f"{path} is damaged and will be made again ({error.__cause__})", stacklevel=3)
            return False
        return True

    def report(self, number: int) -> dict[str, Any]:
        """Read the report that `write_chunk` wrote.

        Raises:
            ValueError: If the chunk is damaged.
        """
        with _opened(self.path(number)) as archive:
            report: dict[str, Any] = json.loads(archive.read(_REPORT))
            return report

    def pack(
        self, count: int, class_names: Sequence[str], vectors: dict[str, np.ndarray] | None = None
    ) -> Made:
        """Pack the chunks into `dest`, and remove them.

        Args:
            count: Number of chunks.
            class_names: Stored with the labels.
            vectors: Vector of each file by its name, if there are any.

        Raises:
            ValueError: If no image is left.
        """
        reports = [self.report(number) for number in range(count)]
        labels = [pair for report in reports for pair in report["labels"]]
        skipped = [Skipped(*pair) for report in reports for pair in report["skipped"]]
        if not labels:
            first = f", the first {skipped[0].name!r}" if skipped else ""
            raise ValueError(f"no image is left: {len(skipped)} were damaged{first}")
        made = Made(self.dest, len(labels), skipped, added_up(report["sums"] for report in reports))
        content: dict[str, Any] = {"labels": labels if labels[0][1] >= 0 else None}
        if class_names:
            content["class_names"] = list(class_names)
        # Tells the same command, when it is run again, that the work is done.
        content[_NOTE] = {
            "settings": self._digest(), "images": len(labels), "skipped": skipped, "sums": made.sums,
        }  # fmt: skip
        beside = {LABEL_FILE: (json.dumps(content, indent=None, separators=(",", ":")) + "\n").encode()}
        if vectors:
            length = len(next(iter(vectors.values())))
            lines = [["image", *(f"entry {i}" for i in range(length))]]
            lines += [[name, *(repr(float(x)) for x in values)] for name, values in vectors.items()]
            beside[VECTOR_FILE] = "".join(",".join(line) + "\n" for line in lines).encode()
        archives = [self.path(number) for number in range(count)]
        if self.dest.suffix:
            self._pack_zip(archives, beside)
        else:
            self._pack_folder(archives, beside)
        shutil.rmtree(self.folder)
        return made

    def _pack_zip(self, archives: Sequence[Path], beside: dict[str, bytes]) -> None:
        with replacing(self.dest) as file, zipfile.ZipFile(file, "w") as target:
            for archive in archives:
                with _opened(archive) as source:
                    for name in _images(source):
                        target.writestr(_entry(name), source.read(name))
            for name, data in beside.items():
                target.writestr(_entry(name), data)

    def _pack_folder(self, archives: Sequence[Path], beside: dict[str, bytes]) -> None:
        with replacing_folder(self.dest) as aside:
            for archive in archives:
                with _opened(archive) as source:
                    for name in _images(source):
                        (aside / name).parent.mkdir(parents=True, exist_ok=True)
                        (aside / name).write_bytes(source.read(name))
            for name, data in beside.items():
                (aside / name).write_bytes(data)


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk's file, whole or not at all, even if the power fails."""
    write_atomic(path, chunk_bytes(chunk))


def chunk_bytes(chunk: Chunk) -> bytes:
    """Content of a chunk's file; equal chunks give equal bytes."""
    labels = [[name, label] for name, label in zip(chunk.files, chunk.labels, strict=True)]
    report = {"labels": labels, "skipped": chunk.skipped, "sums": chunk.sums}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in chunk.files.items():
            archive.writestr(_entry(name), data)
        archive.writestr(_entry(_REPORT), json.dumps(report))
    return content.getvalue()


@contextmanager
def begin(dest: Path, settings: dict[str, Any]) -> Iterator[ChunkFolder]:
    """Begin or continue the making of a data set, and lock it against other processes.

    Args:
        dest: Folder or `.zip` to be made.
        settings: What determines the result, as JSON values.

    Raises:
        ValueError: If dest has another suffix, unfinished work has other settings, or another process holds it.
    """
    if dest.suffix and dest.suffix.lower() != ".zip":
        raise ValueError(f"{dest} must be a folder or end in .zip")
    folder = ChunkFolder(dest, settings)
    if dest.exists() and not folder.folder.exists():
        yield folder
        return
    with claimed(folder.folder, dest):
        if not dest.exists():
            folder.claim()
        yield folder


def _label_file(dest: Path) -> Any:
    # Not by `read_json`: the labels of a million images exceed its bounds, and the file is the user's own.
    if dest.is_dir():
        return json.loads((dest / LABEL_FILE).read_bytes())
    with zipfile.ZipFile(dest) as archive:
        return json.loads(archive.read(LABEL_FILE))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the same command again") from error


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    return info


def _images(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name != _REPORT]


def added_up(sums: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add numbers, and lists of numbers, by name."""
    total: dict[str, Any] = {}
    for part in sums:
        for key, value in part.items():
            if isinstance(value, list):
                total[key] = [a + b for a, b in zip(total.get(key, [0.0] * len(value)), value, strict=True)]
            else:
                total[key] = total.get(key, 0) + value
    return total
