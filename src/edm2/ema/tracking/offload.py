"""Running averages in host memory for a model on an accelerator."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from edm2.ema.tracking.averages import Averages, recorded_event


class HostAverages(Averages):
    """Averages on the CPU: weights are copied through pinned memory, and a thread updates the averages.

    The copy is queued on the current stream, so whatever changes the weights next waits for it. The host goes on
    at once.

    Args:
        tensors: Local tensors at the start, on any device.
        arguments: The other arguments of `Averages`.
    """

    def __init__(self, tensors: Sequence[Tensor], *arguments: Any, **options: Any) -> None:
        self._staging = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x.detach()) for x in tensors
        ]
        super().__init__(self._staging, *arguments, **options)
        self._worker = ThreadPoolExecutor(1, "edm2-ema")
        self._running: Future[None] | None = None

    def update(self, tensors: Sequence[Tensor], t: float) -> None:
        """Move every average towards the tensors; returns before that is done."""
        self._finish()
        for to, x in zip(self._staging, tensors, strict=True):
            to.copy_(x, non_blocking=x.is_cuda)
        copied = [recorded_event(device) for device in dict.fromkeys(x.device for x in tensors if x.is_cuda)]
        self._running = self._worker.submit(self._add, copied, t)

    @torch.no_grad()
    def _add(self, copied: Sequence[Any], t: float) -> None:
        for event in copied:
            event.synchronize()
        super().update(self._staging, t)

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def read(self, track: int) -> Iterator[Tensor]:
        """See `Averages.read`."""
        self._finish()
        return super().read(track)

    def check(self) -> None:
        """See `Averages.check`."""
        self._finish()
        super().check()

    def parts(self, *, window: bool | None = None) -> dict[str, list[Tensor]]:
        """See `Averages.parts`."""
        self._finish()
        return super().parts(window=window)

    def times(self) -> dict[str, float]:
        """See `Averages.times`."""
        self._finish()
        return super().times()

    def set_times(self, start: float, t: float, **times: float) -> None:
        """See `Averages.set_times`."""
        self._finish()
        super().set_times(start, t, **times)

    def adopt(self, averages: Sequence[Sequence[Tensor]], **times: float) -> None:
        """See `Averages.adopt`."""
        self._finish()
        super().adopt(averages, **times)
