"""Folders on file systems that know no locks, as NFS does for folders."""

import errno
from pathlib import Path

import pytest

from edm2.ema.storage.replacing import folder_lock

fcntl = pytest.importorskip("fcntl")


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = False
    told = r"file system without locks for folders \(no locks here\): make sure that no other process writes to it"
    with pytest.warns(UserWarning, match=told), folder_lock(tmp_path, wait=False):
        entered = True
    assert entered


def test_a_held_folder_is_still_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(BlockingIOError), folder_lock(tmp_path, wait=False):
        pass
