"""The images of an archive that is not whole yet: one ZIP for each batch, in the folder `NAME.parts`."""

import functools
import warnings
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path

from edm2.generate.archive import writing

_OPEN = 64  # files that are kept open; each process of torchrun writes parts of its own


class Parts:
    """Encoded images by their seeds.

    Args:
        folder: The folder; it may be missing until the first images are added.
        suffix: Suffix of an image's name, which says how it is encoded.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder, self.suffix = folder, suffix
        self._where: dict[int, Path] = {}
        self._open = functools.lru_cache(maxsize=_OPEN)(zipfile.ZipFile)

    def find(self, *, check: bool = False, warn: bool = False) -> Container[int]:
        """Look for the seeds that the folder holds, and return them; parts that are damaged do not count.

        Args:
            check: Whether to read all images and compare their checksums; otherwise only the parts' tables are read.
            warn: Whether to say that some are damaged.
        """
        self._where, damaged = {}, []
        for file in sorted(self.folder.glob("*.zip")):
            try:
                with zipfile.ZipFile(file) as part:
                    if check and part.testzip() is not None:
                        raise zipfile.BadZipFile
                    self._where |= {int(Path(name).stem): file for name in part.namelist()}
            except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
                damaged.append(file)
        if damaged and warn:
            warnings.warn(
                f"{len(damaged)} files are damaged and will be made again, such as {damaged[0]}", stacklevel=4
            )
        return self._where.keys()

    def add(self, seeds: Sequence[int], contents: Sequence[bytes]) -> None:
        """Store a batch of images that are missing."""
        with writing(self.folder / f"{seeds[0]:06d}.zip") as put:
            for seed, content in zip(seeds, contents, strict=True):
                put(f"{seed}{self.suffix}", [content])

    def read(self, seed: int) -> bytes:
        """An image that `find` found, checked by its checksum."""
        return self._open(self._where[seed]).read(f"{seed}{self.suffix}")

    def remove(self, seeds: Sequence[int]) -> None:
        """Remove parts that are damaged or hold nothing but these seeds."""
        self._open.cache_clear()  # which closes the files
        self.find()
        wanted = set(seeds)
        others = {file for seed, file in self._where.items() if seed not in wanted}
        for file in set(self.folder.glob("*.zip")) - others:
            file.unlink(missing_ok=True)
