"""Post-hoc EMA for the Hugging Face Transformers Trainer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from edm2.ema.callbacks.steps import StepsCallback

STATE_FILE = "power_ema.safetensors"


class PowerEMACallback(StepsCallback, TrainerCallback):
    """Tracks averages while a Trainer trains, and writes a snapshot with every checkpoint and at the end.

    Each checkpoint also holds the running averages, so resuming is exact. Time is counted in optimiser steps.

    Args:
        folder: Folder for the snapshots, for `edm2.ema.reconstruct`.
        sigma_rels: EMA length of each average, as a fraction of training time.
        every: Steps between updates.
        dtype: How snapshots are stored: fp32, bf16 or fp16.
        options: More arguments of `PowerEMA`, such as include, device, live or start.

    Attributes:
        ema: The `PowerEMA`, from the start of training on; evaluate an average in
            `with callback.ema.applied(trainer.model, 0.1): trainer.evaluate()`.

    Raises:
        ValueError: If `every` is below 1; when training starts, if a checkpoint without averages is resumed.
    """

    def __init__(
        self,
        folder: str | Path,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        every: int = 1,
        dtype: str = "fp32",
        **options: Any,
    ) -> None:
        super().__init__(folder, sigma_rels, every, dtype, options)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Start the averages, or continue those of the checkpoint."""
        ema = self._begin(model)
        if state.global_step > ema.start:
            path = _checkpoint(args, state) / STATE_FILE
            if not path.exists():
                raise ValueError(
                    f"training resumes at step {state.global_step} but {path} is missing: resume from a"
                    " checkpoint in output_dir that was written with this callback, or start at that step with"
                    f" PowerEMACallback(..., start={state.global_step})"
                )
            ema.load_state_dict(_read(path))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Update after the optimiser's step, and after the last one."""
        assert self.ema is not None
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.ema.update(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the averages in the checkpoint, and a snapshot in the folder."""
        assert self.ema is not None
        if self.ema.t == self.ema.start:
            return
        self._snapshot(writes=state.is_world_process_zero)
        if state.is_world_process_zero:
            _write(_checkpoint(args, state) / STATE_FILE, self.ema.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take in the last step of a training that stopped early, and write the last snapshot."""
        assert self.ema is not None
        # With load_best_model_at_end, the model already holds the weights of an earlier step here.
        if state.global_step > self.ema.t and not args.load_best_model_at_end:
            self.ema.update(state.global_step)
        self._snapshot(writes=state.is_world_process_zero)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _write(path: Path, state: dict[str, Any]) -> None:
    tensors = {k: v.cpu() for k, v in state.items() if isinstance(v, torch.Tensor)}
    values = {k: v for k, v in state.items() if k not in tensors}
    save_file(tensors, path, metadata={"state": json.dumps(values)})


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {**json.loads(file.metadata()["state"]), **{k: file.get_tensor(k) for k in file.keys()}}  # noqa: SIM118
