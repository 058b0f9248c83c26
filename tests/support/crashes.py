"""Stop a piece of work at each of its operations on files, in several ways, then do the same work again.

The second time must succeed and leave exactly what undisturbed work leaves.
"""

import contextlib
import errno
import gc
import hashlib
import os
import shutil
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ERRORS = {"no space": errno.ENOSPC, "failing disk": errno.EIO}
KINDS = ("kill", "half written", "data lost", "names lost", *_ERRORS)
_KILLED = 77


def check_every_interruption(
    tmp_path: Path,
    work: Callable[[Path], Any],
    *,
    kinds: tuple[str, ...] = KINDS,
    most: int | None = None,
    content: Callable[[Path], Any] = Path.read_bytes,
) -> int:
    """Interrupt work at every operation and do it again.

    Args:
        tmp_path: Empty folder for the attempts.
        work: Does the work below the folder that it is given; called in forked children. Processes that it forks are
            not interrupted.
        kinds: Ways to interrupt.
        most: Interrupt at most so many operations, evenly spread, unless EDM2_EVERY_CRASH is set. Default: all.
        content: Reads what must be equal in a file.

    Returns:
        Number of operations.
    """
    whole, count_file = tmp_path / "whole", tmp_path / "count"
    assert _in_child(whole, work, count_file=count_file) == 0
    expected, count = tree(whole, content), int(count_file.read_text())
    assert _in_child(whole, work) == 0, "the same again fails when all is done"
    assert tree(whole, content) == expected, "the same again changes what is done"
    if os.environ.get("EDM2_EVERY_CRASH"):
        most = None
    numbers = range(1, count + 1)
    for kind in kinds:
        for number in numbers if most is None else numbers[:: -(-count // most)]:
            root = tmp_path / "attempt"
            what = f"{kind} at operation {number} of {count}"
            status = _in_child(root, work, number, kind)
            left = tree(root, content)
            found = {name: left.get(name) for name in expected}
            assert status != 0 or found == expected, f"{what}: exit code 0 with another result"
            assert status in ((0, 1) if kind in _ERRORS else (_KILLED,)), f"{what}: status {status}"
            assert _in_child(root, work) == 0, f"{what}: the same again fails with {sorted(left)}"
            assert tree(root, content) == expected, (
                f"{what}: the same again gives something else from {sorted(left)}"
            )
            shutil.rmtree(root)
    return count


def tree(root: Path, content: Callable[[Path], Any] = Path.read_bytes) -> dict[str, str]:
    """Relative path -> hash of each file, and "folder" for each folder."""
    return {
        str(path.relative_to(root)): "folder"
        if path.is_dir()
        else hashlib.sha256(repr(content(path)).encode()).hexdigest()
        for path in sorted(root.rglob("*"))
    }


def _in_child(
    root: Path, work: Callable[[Path], Any], number: int = 0, kind: str = "", count_file: Path | None = None
) -> int:
    root.mkdir(exist_ok=True)
    backups = root.with_name("backups")
    backups.mkdir()
    alive, held = os.pipe()
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(held)
        os.read(alive, 1)  # until processes that it forked have ended too
        os.close(alive)
        shutil.rmtree(backups)
        return code
    code = 2
    gc.freeze()  # what earlier tests left, such as process groups, would be destroyed without its threads
    try:
        disk = _Disk(root, backups, number, kind)
        disk.watch()
        os.register_at_fork(after_in_child=lambda: setattr(disk, "active", False))
        work(root)
        disk.active = False
        if count_file is not None:
            count_file.write_text(str(disk.count))
        code = 0
    except (OSError, ValueError):
        code = 1
        if kind not in _ERRORS:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Disk:
    """Counts the operations below a folder, interrupts one of them, and loses what was not flushed before it."""

    def __init__(self, root: Path, backups: Path, number: int, kind: str) -> None:
        self.root, self.backups, self.number, self.kind = root, backups, number, kind
        self.count, self.active = 0, True
        self.flushed = {_identity(path) for path in root.rglob("*")}
        # What changed in folders that were not flushed since: the folder, and how to undo it.
        self.changes: list[tuple[str, Callable[[], object]]] = []

    def watch(self) -> None:
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def flush(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if self._is_ours(path):
                self._step(path)
                if stat.S_ISDIR(os.fstat(handle).st_mode):
                    self.changes = [change for change in self.changes if change[0] != path]
                else:
                    self.flushed.add(_identity(handle))
            else:  # what an interruption loses is known from these notes, so the real disk need not be waited for
                fsync(handle)

        def flush_all() -> None:
            self._step(str(self.root))
            self.changes = []
            self.flushed |= {_identity(path) for path in self.root.rglob("*")}

        os.fsync, os.sync = flush, flush_all

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            if isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._opened(_path(args[0]))
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            self._changed(event, _path(args[0], args[-1]))
        elif event == "os.rename":
            self._renamed(_path(args[0], args[2]), _path(args[1], args[3]))

    def _is_ours(self, path: str) -> bool:
        return self.active and (path == str(self.root) or path.startswith(f"{self.root}/"))

    def _step(self, path: str, *, adds: bool = True) -> None:
        self.count += 1
        if self.count != self.number:
            return
        if self.kind not in _ERRORS:
            self.active = False
            self._lose()
            os._exit(_KILLED)
        if adds or self.kind != "no space":
            code = _ERRORS[self.kind]
            raise OSError(code, os.strerror(code), path)

    def _lose(self) -> None:
        if self.kind in ("data lost", "half written"):
            for path in self.root.rglob("*"):
                if path.is_file() and not path.is_symlink() and _identity(path) not in self.flushed:
                    os.truncate(path, path.stat().st_size // 2 if self.kind == "half written" else 0)
        elif self.kind == "names lost":
            for _, undo in reversed(self.changes):
                with contextlib.suppress(OSError):
                    undo()

    def _opened(self, path: str) -> None:
        if self._is_ours(path):
            self._step(path)
            if os.path.lexists(path):
                self.flushed.discard(_identity(path))
            else:
                self._note(path, lambda: os.unlink(path))

    def _changed(self, event: str, path: str) -> None:
        if not self._is_ours(path):
            return
        self._step(path, adds=event == "os.mkdir")
        if event == "os.mkdir":
            if not os.path.lexists(path):
                self._note(path, lambda: shutil.rmtree(path))
        elif os.path.isdir(path):
            self._note(path, lambda: os.mkdir(path))
        elif os.path.lexists(path):
            self._note(path, self._restoring(path))

    def _renamed(self, source: str, target: str) -> None:
        if not self._is_ours(source):
            return
        self._step(source)
        restore = self._restoring(target) if os.path.isfile(target) else None

        def undo() -> None:
            os.rename(target, source)
            if restore is not None:
                restore()

        self._note(target, undo)

    def _restoring(self, path: str) -> Callable[[], object]:
        backup = self.backups / str(self.count)
        self.flushed.discard(_identity(path))
        os.link(path, backup, follow_symlinks=False)
        return lambda: os.link(backup, path)

    def _note(self, path: str, undo: Callable[[], object]) -> None:
        self.changes.append((os.path.dirname(path), undo))


def _path(path: Any, folder: int = -1) -> str:
    path = os.fsdecode(path)
    return (
        os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder >= 0 else os.path.abspath(path)
    )


def _identity(path: "str | Path | int") -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
