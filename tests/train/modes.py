"""Every mode of training, as a run so small that a step takes milliseconds.

Usage: modes.py FOLDER MODE... trains each with two processes, and with one after two were killed.
"""

import dataclasses
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import tiny_config, tiny_data

import edm2.train.outputs
from edm2.data import ArrayDataset, ImageDataset, PairedDataset, crop_at_random
from edm2.distill import distill, open_teacher, student_settings
from edm2.train import ConsistencyConfig, DataConfig, OptimizerConfig, TrainConfig, Trainer, train
from edm2.train.config_groups import ValidateConfig

OnStep = Callable[[Trainer], None]
PAIRS: dict[str, Any] = {"dataset": DataConfig(resample="bilinear", missing="mask", mirror=True)}
HELD_OUT: dict[str, Any] = {"validation": "0.2", "validate": ValidateConfig(every=24)}
MODES: dict[str, dict[str, Any]] = {
    "pairs": PAIRS,
    "vectors": {},
    "crop": {},
    "mean": {**PAIRS, **HELD_OUT, "objective": "mean"},
    "residual": {**PAIRS, "residual": "regression"},
    "init": {"init": "model"},
    "label-dropout": {"label_dropout": 0.3},
    "keep-best": {**HELD_OUT, "keep_best": 2, "keep_checkpoints": 1},
    "adamw": {
        "config": "B",
        "optimizer": OptimizerConfig(
            ref_lr=0.001, decay="cosine", rampup_mimg=0.00003, weight_decay=0.1, clip=0.5
        ),
    },
    "distill": {},
}
NUM_IMAGES = 96


def data_of(mode: str) -> ImageDataset:
    """Classes for the modes that need no more, otherwise images with all that can be given with them."""
    if mode not in ("pairs", "vectors", "crop", "mean", "residual"):
        return tiny_data()
    rng = np.random.default_rng(0)
    if mode == "crop":
        images = rng.normal(0, 1, (40, 1, 8, 8)).astype(np.float32)
        return crop_at_random(PairedDataset(ArrayDataset(images), ArrayDataset(-images)), 4)
    vectors = rng.normal([100, 0], [20, 1], (40, 2)).astype(np.float32)
    if mode == "vectors":
        return PairedDataset(tiny_data(), vectors=vectors)
    images, conditions = rng.normal(280, 8, (40, 2, 4, 4)), rng.normal(-3, 0.1, (40, 3, 2, 2))
    for values in (images, conditions):
        values[rng.random(values.shape) < 0.1] = np.nan
    classes = np.arange(40) % 3
    return PairedDataset(
        ArrayDataset(images.astype(np.float32), classes, missing=True),
        ArrayDataset(conditions.astype(np.float32), missing=True),
        vectors,
    )


def config_of(mode: str, folder: Path) -> TrainConfig:
    """Settings of a mode; what it starts from is trained below the folder when it is missing."""
    short: dict[str, Any] = {"num_images": NUM_IMAGES, "snapshot_images": 48}
    changes = dict(MODES[mode])
    for name, kind in (("residual", "mean"), ("init", "label-dropout")):
        if name in changes:
            changes[name] = str(folder / changes[name])
            if not Path(changes[name]).exists():
                start(kind, folder, Path(changes[name]), num_images=40)
    return tiny_config(**{**short, **changes})


def start(mode: str, folder: Path, out: Path, on_step: OnStep | None = None, **changes: Any) -> Path:
    """Train in a mode, or continue the run."""
    data = data_of(mode)
    if mode != "distill":
        config = dataclasses.replace(config_of(mode, folder), **changes)
        return train(config, out, dataset=data, quiet=True, on_step=on_step)
    teacher = folder / "teacher"
    if not teacher.exists():
        train(tiny_config(num_images=40), teacher, dataset=data, quiet=True)
    opened = open_teacher(teacher)
    config = dataclasses.replace(
        student_settings(opened, teacher),
        num_images=NUM_IMAGES,
        batch_size=8,
        log_images=16,
        checkpoint_images=40,
        consistency=ConsistencyConfig(path="teacher", halvings=3),
    )
    return distill(opened, out, config, dataset=data, quiet=True, on_step=on_step)


def kill_at(num_images: int, rank: int = 0) -> OnStep:
    """The process ends at once after the step that reaches so many images."""

    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == num_images and trainer.world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def in_processes(size: int, work: Callable[[], Any]) -> list[int]:
    """Do the same work in forked processes that form a group; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 0
            try:
                work()
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path, modes: list[str]) -> None:
    for mode in modes:
        start(mode, folder, folder / f"{mode}-one")  # here, so that children find everything imported
        assert in_processes(2, lambda mode=mode: start(mode, folder, folder / f"{mode}-two")) == [0, 0], mode
        for kill in (48, 72):  # right after a checkpoint, which is written behind the training, and amid two
            killed = in_processes(
                1, lambda mode=mode, kill=kill: start(mode, folder, folder / f"{mode}-killed", kill_at(kill))
            )
            assert killed == [-signal.SIGKILL], mode
        start(mode, folder, folder / f"{mode}-killed")
        codes = in_processes(
            2, lambda mode=mode: start(mode, folder, folder / f"{mode}-then-one", kill_at(72, rank=1))
        )
        assert codes[1] == -signal.SIGKILL, mode
        start(mode, folder, folder / f"{mode}-then-one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Files of several processes are compared, between whose starts somebody may commit.
    edm2.train.outputs.git_state = lambda: None
    main(Path(sys.argv[1]), sys.argv[2:])
