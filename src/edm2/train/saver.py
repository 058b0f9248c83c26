"""Checkpoints written in a thread beside the training."""

import threading
from pathlib import Path
from typing import Any

from edm2.train.checkpoint import Role, Tensors, save_checkpoint


class Saver:
    """Writes one checkpoint at a time; a context manager that waits for it at the end.

    A kill leaves the checkpoint whole or not there, as `save_checkpoint` does: only the rename makes it one.

    Args:
        folder: where the run's checkpoints lie.
        keep: number of checkpoints to keep, the newest.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, num_images: int, tensors: Tensors, state: dict[str, Any], *, role: Role) -> None:
        """Begin to write; waits for the one before.

        Args:
            num_images: images seen, the checkpoint's name.
            tensors: copies that nobody changes any more.
            state: JSON values.
            role: as in `save_checkpoint`.

        Raises:
            OSError: if the one before could not be written.
        """
        self.wait()
        # A daemon: a second signal ends the process at once, and an unfinished checkpoint is none.
        self._thread = threading.Thread(
            target=self._write, args=(num_images, tensors, state, role), name="edm2-saver", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything has so far.

        Raises:
            OSError: if the last checkpoint could not be written.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: if it could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self.check()

    def _write(self, num_images: int, tensors: Tensors, state: dict[str, Any], role: Role) -> None:
        try:
            save_checkpoint(self._folder, num_images, tensors, state, keep=self._keep, role=role)
        except BaseException as error:  # handed to the training thread, which decides
            self._error = error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return self.wait()
        # Another error is on its way, which matters more than one of the thread; Ctrl-C again does not wait.
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()
