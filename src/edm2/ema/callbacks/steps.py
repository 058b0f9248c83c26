"""What the callbacks have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from edm2.ema import PowerEMA
from edm2.ema.tracking.sharding import is_sharded


class StepsCallback:
    """Averages of a model that every process holds whole; time is counted in optimiser steps.

    Args:
        folder: Folder for the snapshots.
        sigma_rels: EMA length of each average, as a fraction of training time.
        every: Steps between updates.
        dtype: How snapshots are stored: fp32, bf16 or fp16.
        options: More arguments of `PowerEMA`.

    Attributes:
        ema: The `PowerEMA`, from the start of training on.

    Raises:
        ValueError: If `every` is below 1.
    """

    ema: PowerEMA | None = None

    def __init__(
        self, folder: str | Path, sigma_rels: Sequence[float], every: int, dtype: str, options: dict[str, Any]
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every} must be at least 1: the number of steps between updates")
        self.folder, self.every, self.dtype = Path(folder), every, dtype
        self._sigma_rels, self._options = tuple(sigma_rels), options

    def _begin(self, model: nn.Module) -> PowerEMA:
        if any(is_sharded(p) for p in model.parameters()):
            raise ValueError(
                "this callback cannot write checkpoints of a sharded model (FSDP): call PowerEMA from your own"
                " training loop, where it follows sharded tensors, or train with DDP"
            )
        self.ema = PowerEMA(model, self._sigma_rels, clock="steps", **self._options)
        return self.ema

    def _snapshot(self, *, writes: bool) -> None:
        """Write a snapshot if there was an update and this process writes."""
        assert self.ema is not None
        if writes and self.ema.t > self.ema.start:
            self.ema.snapshot(self.folder, dtype=self.dtype)
