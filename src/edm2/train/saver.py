"""Checkpoints written in a background thread."""

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from edm2.train.checkpoint import Role, Tensors, save_checkpoint


class Saver:
    """Writes one checkpoint at a time. As a context manager, it waits for the last one at the end.

    A kill leaves a checkpoint complete or absent, as with `save_checkpoint`.

    Args:
        folder: Folder of the run's checkpoints.
        keep: Number of newest checkpoints to keep.
        best: Returns the numbers of others to keep.
    """

    def __init__(self, folder: Path, *, keep: int, best: Callable[[], Collection[int]] = tuple) -> None:
        self._folder, self._keep, self._best = folder, keep, best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, num_images: int, tensors: Tensors, state: dict[str, Any], *, role: Role) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Args:
            num_images: Images seen, which name the checkpoint.
            tensors: Copies that nothing else modifies.
            state: JSON values.
            role: As in `save_checkpoint`.

        Raises:
            OSError: If the previous checkpoint could not be written.
        """
        self.wait()
        # A daemon: a second signal ends the process at once, and an unfinished checkpoint does not count.
        self._thread = threading.Thread(
            target=self._write,
            args=(num_images, tensors, state, role, self._best()),
            name="edm2-saver",
            daemon=True,
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last write, if there was one.

        Raises:
            OSError: If the last checkpoint could not be written.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            OSError: If it could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self.check()

    def _write(
        self, num_images: int, tensors: Tensors, state: dict[str, Any], role: Role, best: Collection[int]
    ) -> None:
        try:
            save_checkpoint(self._folder, num_images, tensors, state, keep=self._keep, role=role, best=best)
        except BaseException as error:  # re-raised in the training thread
            self._error = error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return self.wait()
        # The error in flight matters more than one of the thread. A second Ctrl-C does not wait.
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()
