"""Running averages in the host's memory for a model on an accelerator."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from edm2.ema.averages import Averages


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
        """The averages with every update so far, one list a track."""
        self._finish()
        return self._averages.tracks

    def update(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Move every average towards the tensors; returns before that is done."""
        self._finish()
        copied = None
        for to, x in zip(self._staging, tensors, strict=True):
            to.copy_(x, non_blocking=x.is_cuda)
        if any(x.is_cuda for x in tensors):
            copied = torch.cuda.Event()
            copied.record()
        self._pending = self._worker.submit(self._add, copied, list(weights))

    def _add(self, copied: torch.cuda.Event | None, weights: list[float]) -> None:
        if copied is not None:
            copied.synchronize()
        self._averages.update(self._staging, weights)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
