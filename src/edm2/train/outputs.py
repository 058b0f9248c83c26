"""What a run writes in addition to its logs: snapshots of the averages, checkpoints, and the model at the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from edm2.diffusion import MODEL_FILE, Denoiser
from edm2.diffusion.model_file import reading_order, write_model
from edm2.ema import PowerEMA
from edm2.ema.storage.manifest import MANIFEST
from edm2.ema.storage.tensorfile import TensorSpec
from edm2.files import Range, from_json
from edm2.train import run_folder
from edm2.train.build import git_state, versions
from edm2.train.checkpoint import (
    Role,
    StoredTensors,
    Tensors,
    find_newest,
    prune,
    read_checkpoint,
    save_in_parts,
)
from edm2.train.config import TrainConfig
from edm2.train.records import Records
from edm2.train.saver import Saver
from edm2.train.validation import best_moments
from edm2.train.world import World


@dataclass(frozen=True, kw_only=True)
class _Stored:
    snapshots: list[Annotated[int, Range(low=0, high=1 << 62)]]


class Outputs:
    """Writes a run's snapshots, checkpoints and model into its folder, and finds them again.

    Args:
        config: All settings.
        out: Folder of the run.
        settings: What checkpoints say about the settings.
        run_id: Name of the run.
        info: What snapshots and models say about data and coding.
        records: The logs of the run.

    Attributes:
        saver: Writes checkpoints in the background.
        snapshot_times: Images seen at each snapshot that was taken.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        settings: dict[str, Any],
        run_id: str,
        info: dict[str, Any],
        records: Records,
    ) -> None:
        self._config, self._out, self._records = config, out, records
        self._settings, self._run_id, self._info = settings, run_id, info
        self.checkpoints = out / run_folder.CHECKPOINTS
        self.saver = Saver(self.checkpoints, keep=config.keep_checkpoints, best=self.best_moments)
        self.snapshot_times: list[int] = []

    def best_moments(self) -> list[int]:
        """Images seen at the moments whose checkpoints are kept for their loss on held-out images."""
        return best_moments(self._records.validations(), self._config.keep_best)

    def snapshot(self, ema: PowerEMA, denoiser: Denoiser, num_images: int) -> None:
        """Store the averages in the snapshot folder."""
        folder = self._out / run_folder.SNAPSHOTS
        # Written once: data may move, and the preset may be renamed, during a run.
        described = (folder / MANIFEST).exists()
        description = {"network": denoiser.options, "info": self._info}
        ema.snapshot(folder, metadata=None if described else description, dtype=self._config.ema.dtype)
        self.snapshot_times.append(num_images)

    def lost_snapshots(self) -> list[str]:
        """Say which snapshots that were taken are missing or damaged."""
        return run_folder.find_lost_snapshots(self._out, self.snapshot_times, self._config.ema.sigma_rels)

    def save_checkpoint(
        self, num_images: int, tensors: Tensors, values: dict[str, Any], role: Role, parts_of: World | None
    ) -> None:
        """Start writing a checkpoint; or with all processes write one in parts.

        Args:
            num_images: Images seen.
            tensors: Copies that nothing else modifies; or this process's part.
            values: JSON values of the state in addition to the tensors.
            role: See `edm2.train.checkpoint.save_checkpoint`.
            parts_of: The processes, if each writes a part.

        Raises:
            OSError: If this checkpoint, or the previous one, could not be written.
        """
        state = {
            "num_images": num_images,
            "run_id": self._run_id,
            **values,
            "snapshots": list(self.snapshot_times),
            "settings": self._settings,
            "versions": versions(),
            "git": git_state(),
        }
        if parts_of is None:
            self.saver.save(num_images, tensors, state, role=role)
        else:
            save_in_parts(
                self.checkpoints,
                num_images,
                tensors,
                state,
                keep=self._config.keep_checkpoints,
                role=role,
                best=self.best_moments(),
                world=parts_of,
            )

    def find_checkpoint(self) -> int | None:
        """Find the newest intact checkpoint, and delete unwanted ones.

        Returns:
            Images seen; None if there is no checkpoint.

        Raises:
            ValueError: If the run had checkpoints and none is usable.
        """
        found = find_newest(self.checkpoints, run_id=self._run_id)
        if found is None:
            run_folder.check_not_lost(self._out)
            return None
        prune(self.checkpoints, keep=self._config.keep_checkpoints, best=self.best_moments())
        return int(found.name)

    def read_checkpoint(self, num_images: int) -> tuple[StoredTensors, dict[str, Any]]:
        """Open the tensors and read the state of a checkpoint that `find_checkpoint` found."""
        tensors, state = read_checkpoint(self.checkpoints / f"{num_images:012d}")
        self.snapshot_times = from_json(_Stored, {"snapshots": state["snapshots"]}).snapshots
        return tensors, state

    def write_model(self, denoiser: Denoiser, ema: PowerEMA | None, num_images: int, world: World) -> None:
        """Write the longest tracked average as the run's model; all processes call it.

        Where the network is sharded, each process holds its part of one average and one whole tensor at a time.

        Args:
            denoiser: The network.
            ema: Its averages, if this process has them.
            num_images: Images seen.
            world: The processes.

        Raises:
            OSError: If snapshots were lost while the run went on; the model is written anyway.
        """
        longest = max(self._config.ema.sigma_rels)
        info = {**self._info, "sigma_rel": longest, "num_images": num_images, "run_id": self._run_id}
        parameters = dict(denoiser.named_parameters(remove_duplicate=False))
        averaged = {name for name, x in parameters.items() if x.is_floating_point()}
        specs = [
            TensorSpec(name=n, dtype=torch.float32 if n in averaged else x.dtype, shape=tuple(x.shape))
            for n, x in denoiser.state_dict().items()
        ]
        tensors: Iterator[torch.Tensor | None] = iter(())
        if ema is not None:
            tensors = ema.average_on_first(longest, reading_order(specs))

        def write() -> None:
            whole = (x for x in tensors if x is not None)
            try:
                write_model(self._out / MODEL_FILE, denoiser.options, specs, whole, info)
            finally:
                for _ in tensors:  # the others send their parts until the end
                    pass
            if problems := self.lost_snapshots():
                raise OSError(
                    f"training is done and {self._out / MODEL_FILE} is written, but snapshots are lost, which other "
                    f"EMA lengths are made from: {'; '.join(problems)}. Restore them from a copy, then run the same "
                    "command again"
                )

        if not world.is_first:
            for _ in tensors:
                pass
        world.on_first(write)
