"""Named files in a folder or a ZIP, read without any state that threads or processes would share."""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol


class Storage(Protocol):
    """A set of files: `names` in order with forward slashes, `sizes` in bytes."""

    names: list[str]
    sizes: list[int]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a file is an operating system's own (`.DS_Store`, `__MACOSX/`), not the user's."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class FolderStorage:
    """The files below a folder.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        found = []
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = [name for name in below if not is_hidden(name)]
            prefix = Path(folder).relative_to(root)
            found += [((prefix / file).as_posix(), os.path.getsize(Path(folder, file))) for file in files]
        found = sorted(entry for entry in found if not is_hidden(entry[0]))
        self.names = [name for name, _ in found]
        self.sizes = [size for _, size in found]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them."""
        with open(self._root / name, "rb") as file:
            return file.read(-1 if limit is None else limit)


class _Entry(NamedTuple):
    offset: int
    stored: int
    size: int
    deflated: bool
    crc: int


class ZipStorage:
    """The files in a ZIP, stored or deflated.

    zipfile's own reader shares one file position between threads and forked processes, so this one takes
    from it the table of contents only and opens the file anew for every read.

    Args:
        path: an existing file.

    Raises:
        ValueError: for a damaged ZIP, an encrypted entry or another compression.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} is not a readable ZIP ({error}): copy or make it again") from error
        self._entries: dict[str, _Entry] = {}
        for info in infos:
            name = info.filename.replace("\\", "/")
            if info.is_dir() or is_hidden(name):
                continue
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

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them.

        Raises:
            ValueError: where the bytes do not agree with the ZIP's own checksum.
        """
        entry = self._entries[name]
        with open(self._path, "rb") as file:
            file.seek(entry.offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise ValueError(f"{self._path} is damaged: {name!r} is not where its table says")
            file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            data = file.read(entry.stored if limit is None or entry.deflated else min(limit, entry.stored))
        if entry.deflated:
            try:
                # The bound keeps a forged entry from filling the memory.
                data = zlib.decompressobj(-15).decompress(data, limit or entry.size or 1)
            except zlib.error as error:
                raise ValueError(f"{self._path} is damaged at {name!r} ({error})") from error
        if limit is None and (len(data) != entry.size or zlib.crc32(data) != entry.crc):
            raise ValueError(f"{self._path} is damaged: the checksum of {name!r} does not agree")
        return data
