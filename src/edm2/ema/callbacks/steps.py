"""What the callbacks have in common."""

from typing import Any

from torch import nn

from edm2.ema import PowerEMA
from edm2.ema.tracking.sharding import is_sharded


def track_steps(model: nn.Module, sigma_rels: tuple[float, ...], **options: Any) -> PowerEMA:
    """A tracker that counts optimiser steps, for a model that every process holds whole.

    Raises:
        ValueError: If the model is sharded over processes.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "this callback cannot write checkpoints of a sharded model (FSDP): call PowerEMA from your own"
            " training loop, where it follows sharded tensors, or train with DDP"
        )
    return PowerEMA(model, sigma_rels, clock="steps", **options)


def check_every(every: int) -> None:
    """Refuse a number of steps between updates below 1."""
    if every < 1:
        raise ValueError(f"every {every} must be at least 1: the number of steps between updates")
