"""Named files in a folder or a ZIP, read without state that threads or processes would share."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

# Files up to this size are looked at whole, larger ones in four blocks that make up as much.
_CHECKED_BYTES = 1 << 16
_BLOCKS = 4
# A ZIP of megabytes can unpack to gigabytes.
_MAX_UNPACKED = 1 << 31


class Storage(Protocol):
    """A set of files: `names` in order with forward slashes, `sizes` in bytes."""

    names: list[str]
    sizes: list[int]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them."""
        ...

    def checksum(self, name: str) -> int:
        """A number that tells the file's content from another of the same size; 0 if it cannot be read."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a file belongs to the operating system (`.DS_Store`, `__MACOSX/`) and not to the user."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def plain_name(name: str) -> str:
    """A name inside a data set with forward slashes and without `./`."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part != ".")


def file_checksum(path: Path) -> int:
    """CRC-32 of a file of up to 64 KiB; of a larger file, of four blocks of 16 KiB spread from start to end.

    The bound keeps a million large files fast. A change between the blocks that keeps the size goes unnoticed.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _CHECKED_BYTES:
                return zlib.crc32(file.read(_CHECKED_BYTES))
            length, crc = _CHECKED_BYTES // _BLOCKS, 0
            for block in range(_BLOCKS):
                file.seek((size - length) * block // (_BLOCKS - 1))
                crc = zlib.crc32(file.read(length), crc)
            return crc
    except OSError:
        return 0


class FolderStorage:
    """The files below a folder; links are followed.

    Args:
        root: An existing folder.

    Raises:
        ValueError: If a folder cannot be read, or a link leads back to a folder that contains it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        found = sorted(_walk(root))
        self.names = [name for name, _ in found]
        self.sizes = [max(size, 0) for _, size in found]
        self._unreadable = {name for name, size in found if size < 0}

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them.

        Raises:
            OSError: If the file cannot be read.
        """
        if name in self._unreadable:
            # Opening a pipe would block.
            raise OSError("it is a broken link, or not a regular file")
        with open(self._root / name, "rb") as file:
            return file.read(-1 if limit is None else limit)

    def checksum(self, name: str) -> int:
        """See `file_checksum`."""
        return 0 if name in self._unreadable else file_checksum(self._root / name)


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Name and size of every file; -1 for a broken link or a special file.

    Not by os.walk, which skips folders that it cannot read, and follows links in circles.
    """
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        prefix, above = pending.pop()
        folder = root / prefix
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be read ({error.strerror}), so its images would be missing: make it "
                "readable (chmod u+rx), or move it away"
            ) from error
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ValueError(f"{folder} is a link to a folder that contains it: delete the link")
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                pending.append((f"{name}/", (*above, identity)))
            else:
                yield name, _size(entry)


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def zip_of(path: Path) -> tuple[Path, str] | None:
    """The ZIP that a path names, and the folder inside it, such as `photos` of `data.zip/photos`; None if neither."""
    for place in (path, *path.parents):
        if place.exists():
            is_zip = place.is_file() and zipfile.is_zipfile(place)
            return (place, path.relative_to(place).as_posix().removeprefix(".")) if is_zip else None
    return None


class _Entry(NamedTuple):
    offset: int
    stored: int
    size: int
    deflated: bool
    crc: int


class ZipStorage:
    """The files in a ZIP, stored or deflated.

    The reader of `zipfile` shares one file position between threads and forked processes. This class takes only the
    table of contents from it and opens the file for each read, which is as fast and needs neither locks nor reopening
    in child processes.

    Args:
        path: An existing file.
        inside: Folder inside the ZIP, to which names are relative; "" is the top.

    Raises:
        ValueError: If the ZIP is damaged, an entry is encrypted or compressed by another method, or a name leads out
            of the ZIP or occurs twice.
    """

    def __init__(self, path: Path, inside: str = "") -> None:
        self._path = path
        try:
            self._bytes = path.stat().st_size
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except Exception as error:
            # zipfile raises dozens of kinds of errors for a damaged table of contents.
            raise ValueError(f"{path} is not a readable ZIP ({error}): copy or make it again") from error
        self._entries: dict[str, _Entry] = {}
        for info in infos:
            name = plain_name(info.filename)
            if not info.filename or ".." in name.split("/") or name.startswith("/"):
                raise ValueError(
                    f"{info.filename!r} in {path} is not the name of a file inside the ZIP: make the ZIP again from "
                    "inside its folder"
                )
            if not name or name.endswith("/") or is_hidden(name):
                continue
            if inside:
                if not name.startswith(f"{inside}/"):
                    continue
                name = name[len(inside) + 1 :]
            if name in self._entries:
                raise ValueError(f"{path} holds {name!r} twice: make the ZIP again with each name once")
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{name!r} in {path} is encrypted or compressed by another method than deflate: "
                    "make the ZIP again without compression (zip -0 -r data.zip folder)"
                )
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            self._entries[name] = _Entry(
                info.header_offset, info.compress_size, info.file_size, deflated, info.CRC
            )
        self.names = sorted(self._entries)
        self.sizes = [self._entries[name].size for name in self.names]

    def checksum(self, name: str) -> int:
        """CRC-32 of the whole file, as the ZIP's table has it."""
        return self._entries[name].crc

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them.

        Raises:
            ValueError: If the bytes do not agree with the ZIP's own checksum, or would unpack to gigabytes.
        """
        entry = self._entries[name]
        if entry.deflated and entry.size > _MAX_UNPACKED:
            raise ValueError(
                f"{name!r} in {self._path} unpacks to {entry.size:,} bytes, more than {_MAX_UNPACKED:,}: make the ZIP "
                "again without compression (zip -0 -r data.zip folder)"
            )
        with open(self._path, "rb") as file:
            # Beyond 63 bits, seeking raises an OverflowError.
            file.seek(min(max(entry.offset, 0), self._bytes))
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise ValueError(f"{self._path} is damaged: {name!r} is not where the table of contents says")
            file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            # Bounds keep a forged entry from filling the memory.
            stored = min(entry.stored, self._bytes)
            data = file.read(stored if limit is None or entry.deflated else min(limit, stored))
        if entry.deflated:
            try:
                data = zlib.decompressobj(-15).decompress(data, limit or entry.size or 1)
            except zlib.error as error:
                raise ValueError(f"{self._path} is damaged at {name!r} ({error})") from error
        if limit is None and (len(data) != entry.size or zlib.crc32(data) != entry.crc):
            raise ValueError(f"{self._path} is damaged: the checksum of {name!r} does not agree")
        return data
