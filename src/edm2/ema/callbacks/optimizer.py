"""Post-hoc EMA from an optimiser's own steps, whatever the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from edm2.ema.tracking.tracker import PowerEMA


class OptimizerHook:
    """Updates a `PowerEMA` after the steps of an optimiser; made by `PowerEMA.attach`.

    Args:
        ema: The averages.
        optimizer: The optimiser; the one inside where a library wrapped it.
        every: Steps between updates.
        clock: Gives the time; None counts steps.
        folder: Folder for the last snapshot, or None.
        options: More arguments of `snapshot`.

    Raises:
        ValueError: If `every` is below 1.
    """

    def __init__(
        self,
        ema: "PowerEMA",
        optimizer: torch.optim.Optimizer,
        every: int,
        clock: Callable[[], float] | None,
        folder: str | Path | None,
        options: dict[str, Any],
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every} must be at least 1: the number of steps between updates")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # Accelerate and Lightning hold the real optimiser there
        self._ema, self._every, self._clock = ema, every, clock
        self._folder, self._options = folder, options
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        if self._clock is None:  # steps that were counted by hand before
            self._ema.steps = max(self._ema.steps, round(self._ema.t - self._ema.start))
        self._ema.steps += 1
        if self._ema.steps % self._every == 0:
            self._ema.update(self._time())

    def _time(self) -> float:
        return self._ema.start + self._ema.steps if self._clock is None else self._clock()

    def finish(self) -> None:
        """Take in steps since the last update, write a last snapshot if there is a folder, and detach."""
        self.remove()
        if self._time() > self._ema.t:
            self._ema.update(self._time())
        if self._folder is not None and self._ema.t > self._ema.start:
            self._ema.snapshot(self._folder, **self._options)

    def remove(self) -> None:
        """Detach from the optimiser."""
        self._handle.remove()
