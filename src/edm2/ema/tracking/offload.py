"""Running averages in the host's memory for a model on an accelerator."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from edm2.ema.tracking.averages import Averages
from edm2.ema.tracking.window import Step, Window


class HostAverages:
    """Averages on the CPU: copies go through pinned memory, the sums run in a thread beside the training.

    The copy is queued on the current stream, so that whatever changes the weights next waits for it, and
    only for it; the host goes on at once.

    Args:
        tensors: Local tensors at the start, on any device.
        num_tracks: Number of averages.
        dtype: Element type of the averages.
    """

    def __init__(self, tensors: Sequence[Tensor], num_tracks: int, *, dtype: torch.dtype) -> None:
        self._staging = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x.detach()) for x in tensors
        ]
        self._averages = Averages(self._staging, num_tracks, dtype=dtype)
        self._worker = ThreadPoolExecutor(1, "edm2-ema")
        self._pending: Future[None] | None = None

    @property
    def tracks(self) -> list[list[Tensor]]:
        """The averages, one list a track; see `Averages`."""
        self._finish()
        return self._averages.tracks

    @property
    def window(self) -> Window | None:
        """The window, None until the first one is needed."""
        self._finish()
        return self._averages.window

    def make_window(self) -> Window:
        """The window, made where there is none yet."""
        self._finish()
        return self._averages.make_window()

    def read(self, track: int, share: float) -> Iterator[Tensor]:
        """An average with every update so far; see `Averages.read`."""
        self._finish()
        return self._averages.read(track, share)

    def update(self, tensors: Sequence[Tensor], step: Step) -> None:
        """Move every average towards the tensors; returns before that is done."""
        self._finish()
        for to, x in zip(self._staging, tensors, strict=True):
            to.copy_(x, non_blocking=x.is_cuda)
        copied = []
        for device in dict.fromkeys(x.device for x in tensors if x.is_cuda):
            # The current stream of the process may belong to another device than the weights.
            copied.append(torch.cuda.Event())
            copied[-1].record(torch.cuda.current_stream(device))
        self._pending = self._worker.submit(self._add, copied, step)

    def _add(self, copied: Sequence[torch.cuda.Event], step: Step) -> None:
        for event in copied:
            event.synchronize()
        self._averages.update(self._staging, step)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
