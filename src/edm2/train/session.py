"""A training run from its settings to its model: joins the processes, opens the data, holds the folder, trains."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edm2.data import ImageDataset
from edm2.diffusion import NetworkFunction
from edm2.progress import tell
from edm2.train import run_folder
from edm2.train.build import open_training_data
from edm2.train.config import TrainConfig
from edm2.train.consistency import Teacher
from edm2.train.dry_run import faster_dtype
from edm2.train.loggers import Logger
from edm2.train.loop import Trainer
from edm2.train.world import World, join_world


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    dataset: ImageDataset | None = None,
    network: NetworkFunction | None = None,
    teacher: Teacher | None = None,
    preset: str = "",
    quiet: bool = False,
    on_step: Callable[[Trainer], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> Path:
    """Train a model, or continue the run in the folder; under torchrun, on all of its processes.

    Args:
        config: All settings.
        out: Folder of the run, visible to all processes.
        dataset: Training images. Default: the data that the configuration names.
        network: Function of (img_resolution, img_channels, label_dim) that makes the network; see
            `edm2.diffusion.register_network`. Default: the one that the configuration names, or its U-Net.
        teacher: Model to tune for consistency, with `config.consistency`; stored in the run's folder.
        preset: Name of the preset behind the settings, stored for reference.
        quiet: Do not show progress.
        on_step: Called with the trainer after every step.
        loggers: Receive every log record; see `edm2.train.loggers`.

    Returns:
        File of the final model: the longest tracked average at the end of the run.

    Raises:
        ValueError: If settings or data are invalid, the folder holds another run, or no checkpoint can be read.
        FloatingPointError: If losses or gradients stay non-finite.
        OSError: If a file cannot be written; older checkpoints are untouched. If snapshots were lost.
        Stopped: After SIGINT, SIGTERM, `max_hours` or `Trainer.request_stop`, once a checkpoint is written.
    """
    with join_world(config.device) as world:
        # A separate function, so that nothing refers to the process group once it returns.
        return _train(config, Path(out), world, dataset, network, teacher, preset, quiet, on_step, loggers)


def _train(
    config: TrainConfig,
    out: Path,
    world: World,
    dataset: ImageDataset | None,
    network: NetworkFunction | None,
    teacher: Teacher | None,
    preset: str,
    quiet: bool,
    on_step: Callable[[Trainer], None] | None,
    loggers: Sequence[Logger],
) -> Path:
    with ExitStack() as held:
        world.on_first(lambda: held.enter_context(run_folder.hold(out)))
        if teacher is not None:
            world.on_first(lambda: teacher.save(out))
        dataset = open_training_data(config) if dataset is None else dataset
        if config.dtype == "auto":
            config = dataclasses.replace(config, dtype=_measured_dtype(config, out, dataset, world))
        trainer = Trainer(config, dataset, out, network=network, preset=preset, world=world)
        trainer.resume()
        with trainer.logging_to(loggers):
            try:
                trainer.run(quiet=quiet, on_step=on_step)
            finally:
                trainer.close()
        return trainer.finish()


def _measured_dtype(config: TrainConfig, out: Path, dataset: ImageDataset, world: World) -> Any:
    """The precision of the run in the folder; of a new run, the faster one."""
    if (out / run_folder.CONFIG_FILE).exists():
        return run_folder.read_config(out)["settings"]["dtype"]
    if world.size > 1 or config.consistency is not None:
        what = "several processes" if world.size > 1 else "a student"
        raise ValueError(f"dtype auto is not measured for {what}: choose float32 or bfloat16")
    dtype = faster_dtype(config, dataset)
    tell(f"edm2: the network computes in {dtype}, the faster precision in a few steps")
    return dtype
