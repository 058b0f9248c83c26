"""One writer at a time in a folder."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Answers of network file systems that cannot lock folders: NFS needs a file open for writing, Lustre a mount option.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder against other writers. The system releases it if the process dies.

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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{folder} lies on a file system without locks for folders ({error.strerror}): make sure that no other "
                "process writes there",
                stacklevel=3,
            )
        # The holder may have removed the folder before it let go.
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(handle)
