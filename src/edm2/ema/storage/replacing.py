"""Files and folders that appear whole or not at all: written aside, flushed to the disk, renamed."""

import errno
import hashlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_filled: set[tuple[int, int]] = set()  # folders that this process fills, by device and inode
_FULL = (errno.ENOSPC, errno.EDQUOT)
# How file systems say that folders cannot be flushed.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, durable: bool = True, name: Callable[[], str] | None = None
) -> Iterator[BinaryIO]:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part.

    The content goes to `.NAME.tmp` next to the file, which is created exclusively, so that it never goes through a
    link, and locked while it is written: a second writer takes another name, and what a killed writer left is removed
    by the next one. The last of several writers wins. `file.name` is the temporary path, for libraries that open files
    by name; they must write into that file, not replace it.

    Args:
        path: File to write or replace; its folder is made if missing.
        durable: Whether the file must survive a power cut, which costs milliseconds per file.
        name: Called once everything is written; gives the final name, in the same folder, where it depends on the
            content.

    Yields:
        The file, open for writing.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. It names the file, whose old content
            is still there.
    """
    path = Path(path)
    with _explained(path):
        make_folder(path.parent, durable=durable)
        with _aside_file(path) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if os.name == "nt":  # open files cannot be renamed there
                file.close()
            os.replace(file.name, path if name is None else path.with_name(name()))
    if durable:
        sync_folder(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Fill a folder that appears under its name when it is whole, and takes the place of an older one.

    Args:
        path: Folder to make or replace.
        flush: Flush all files at the end; not needed where each was written with `replacing`.

    Yields:
        The temporary folder to fill.

    Raises:
        OSError: If it cannot be written; an older folder is still there.
    """
    path = Path(path)
    with _explained(path):
        make_folder(path.parent)
        with _aside_folder(path) as aside:
            yield aside
            if flush and hasattr(os, "sync"):  # one call instead of one for each of many small files
                os.sync()
            if path.is_dir():
                with _aside_folder(path) as old:
                    os.replace(path, old / path.name)
                    os.replace(aside, path)
            else:
                os.replace(aside, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, renamed first: a kill half-way leaves no part of it under its name."""
    with _aside_folder(path) as aside:
        os.replace(path, aside / path.name)


def make_folder(folder: Path, *, durable: bool = True) -> None:
    """Make a folder and its parents where missing, so that their names survive a power cut."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), [folder, *folder.parents]))
    folder.mkdir(parents=True, exist_ok=True)
    if durable:
        for made in reversed(missing):
            sync_folder(made.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's names to the disk, so that a rename survives a power cut; nothing where that is impossible."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise OSError(
                error.errno, f"could not flush {os.fspath(folder)} to the disk ({reason(error)})"
            ) from error
    finally:
        os.close(handle)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def reason(error: OSError) -> str:
    """The system's words for an error, without the file that it names."""
    return os.strerror(error.errno) if error.errno else str(error)


def remedy(error: OSError) -> str:
    """What to do about a failed write: make room if the disk is full, else fix what the system names."""
    return "make room" if error.errno in _FULL else "put that right"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Let errors of writing name the file; those about other files, as of what is read meanwhile, stay."""
    try:
        yield
    except OSError as error:
        if not _is_about(error, path):
            raise
        text = f"could not write {path} ({reason(error)}): what it held is untouched"
        if error.errno in _FULL:
            text += "; make room and try again"
        raise OSError(error.errno, text) from error


def _is_about(error: OSError, path: Path) -> bool:
    if error.filename is None:
        return error.errno is not None
    named = Path(os.fsdecode(error.filename))
    return path.is_relative_to(named) or any(part.startswith(f".{path.name[:20]}") for part in named.parts)


def _asides(path: Path) -> Iterator[Path]:
    """Temporary names of a file or folder, in the order in which writers try them."""
    short = os.fsencode(path.name)[:200].decode(errors="ignore")
    numbered = (path.with_name(f".{short}{n}.tmp") for n in ("", *(f".{i}" for i in range(2, 100))))
    first = list(itertools.islice(numbered, 3))
    for aside in first:
        _remove_dead(aside)
    yield from first
    yield from numbered
    raise OSError(errno.EEXIST, "too many writers at once, or temporary files of dead ones", str(aside))


@contextmanager
def _aside_file(path: Path) -> Iterator[BinaryIO]:
    """A locked temporary file, removed unless it has been renamed."""
    for aside in _asides(path):
        try:
            file = open(aside, "xb")  # noqa: SIM115 (closed below)
        except FileExistsError:  # another writer is at it
            continue
        with file:
            if not _hold(file.fileno(), aside):
                continue
            try:
                yield file
            except BaseException:
                if file.closed or os.name == "nt":
                    file.close()
                    aside.unlink(missing_ok=True)
                elif _is_same(file.fileno(), aside):
                    aside.unlink()
                raise
            return


@contextmanager
def _aside_folder(path: Path) -> Iterator[Path]:
    """A locked temporary folder; what is left of it is removed."""
    for aside in _asides(path):
        try:
            aside.mkdir()
            handle = None if os.name == "nt" else os.open(aside, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError):
            continue
        filled = _identity(handle)
        _filled.add(filled)
        try:
            if handle is None or _hold(handle, aside):
                yield aside
                return
        finally:
            _filled.discard(filled)
            if handle is None or _is_same(handle, aside):
                shutil.rmtree(aside, ignore_errors=True)
            if handle is not None:
                os.close(handle)


def _hold(handle: int, aside: Path) -> bool:
    """Lock what was just made; False if another writer took it for dead and removed it before it was locked."""
    _lock(handle, wait=True)
    return _is_same(handle, aside)


def _identity(handle: int | None) -> tuple[int, int]:
    status = None if handle is None else os.fstat(handle)
    return (0, 0) if status is None else (status.st_dev, status.st_ino)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_dead(aside: Path) -> None:
    """Remove what a writer left that is not alive any more, which its lock shows."""
    if not os.path.lexists(aside):
        return
    if os.name == "nt" and not aside.is_dir():
        with suppress(PermissionError):  # files that are open cannot be removed there
            aside.unlink(missing_ok=True)
    elif aside.is_symlink():
        aside.unlink(missing_ok=True)
    elif os.name != "nt":
        with suppress(OSError):
            handle = os.open(aside, os.O_RDONLY if aside.is_dir() else os.O_WRONLY | os.O_NOFOLLOW)
            try:
                if _lock(handle, wait=False) and _is_same(handle, aside):
                    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether the lock is held now; where the file system has no locks, nothing is held and nothing is dead."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# Answers of network file systems that cannot lock folders: NFS needs a file open for writing, Lustre a mount option.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder against other writers. The system releases it if the process dies.

    A folder that `replacing_folder` is filling is held already.

    Args:
        folder: An existing folder.
        wait: Whether to wait while another writer holds it.

    Raises:
        BlockingIOError: If another writer holds it and `wait` is False.
        FileNotFoundError: If the folder is missing, or was removed by the writer that held it.

    On Windows and, with a warning, on network file systems without such locks, the caller must be the only writer.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        if _identity(handle) in _filled:
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{folder} is on a file system without locks for folders ({error.strerror}): make sure that no other "
                "process writes to it",
                stacklevel=3,
            )
        # The holder may have removed the folder before it let go.
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(handle)
