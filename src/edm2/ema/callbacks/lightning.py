"""Post-hoc EMA for Lightning."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from edm2.ema.callbacks.steps import StepsCallback


class PowerEMACallback(StepsCallback, Callback):
    """Tracks averages while a Trainer fits. They are part of its checkpoints, so resuming is exact.

    Time is counted in optimiser steps, as in `trainer.global_step`.

    Args:
        folder: Folder for the snapshots, for `edm2.ema.reconstruct`.
        sigma_rels: EMA length of each average, as a fraction of training time.
        every: Steps between updates.
        snapshot_every: Steps between snapshots, a multiple of `every`. Default: one, at the end.
        validate_with: Validate with the average of this EMA length. Default: with the raw weights.
        dtype: How snapshots are stored: fp32, bf16 or fp16.
        options: More arguments of `PowerEMA`, such as include, device, live or start.

    Attributes:
        ema: The `PowerEMA`, from the start of the fit on.

    Raises:
        ValueError: If `every` is below 1, or `snapshot_every` is not a multiple of it; when training starts, if the
            checkpoint that is resumed has no averages.
    """

    def __init__(
        self,
        folder: str | Path,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        every: int = 1,
        snapshot_every: int | None = None,
        validate_with: float | None = None,
        dtype: str = "fp32",
        **options: Any,
    ) -> None:
        super().__init__(folder, sigma_rels, every, dtype, options)
        if snapshot_every is not None and (snapshot_every < every or snapshot_every % every):
            raise ValueError(
                f"snapshot_every {snapshot_every} must be a multiple of every {every}: a snapshot holds the"
                " averages as they were last updated"
            )
        self.snapshot_every, self.validate_with = snapshot_every, validate_with
        self._resumed: dict[str, Any] | None = None
        self._knows_past = False
        self._applied = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        """The averages, for Lightning's checkpoint."""
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the weights are where they train."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the averages, or continue those of the checkpoint or of this trainer's last fit."""
        goes_on = self.ema is not None and self.ema.start < self.ema.t <= trainer.global_step
        self._knows_past = goes_on or bool(self._resumed)
        if self._resumed or not goes_on:
            ema = self._begin(pl_module)
            if self._resumed:
                ema.load_state_dict(self._resumed)
            self._resumed = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to average from the middle of a training on."""
        assert self.ema is not None
        if trainer.global_step > self.ema.start and not self._knows_past:
            raise ValueError(
                f"training resumes at step {trainer.global_step} but the checkpoint has no averages: resume from a"
                " checkpoint that was written with this callback, or start at that step with"
                f" PowerEMACallback(..., start={trainer.global_step})"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update if the optimiser made a step."""
        assert self.ema is not None
        step = trainer.global_step
        if step <= self.ema.t or step % self.every:
            return
        self.ema.update(step)
        if self.snapshot_every is not None and step % self.snapshot_every == 0:
            self._snapshot(writes=trainer.is_global_zero)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the last step and write the last snapshot."""
        assert self.ema is not None
        if trainer.global_step > self.ema.t:
            self.ema.update(trainer.global_step)
        self._snapshot(writes=trainer.is_global_zero)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the chosen average in."""
        if self.validate_with is not None and self.ema is not None and self.ema.t > self.ema.start:
            self._applied.enter_context(self.ema.applied(pl_module, self.validate_with))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self._applied.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back, wherever it stopped."""
        self._applied.close()
