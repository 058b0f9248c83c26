"""Trains in groups of processes forked from one that has everything imported; and alone, under torchrun.

Usage: distributed_worker.py FOLDER
       torchrun ... distributed_worker.py FOLDER killed
"""

import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.fsdp
from modes import in_processes
from tiny_run import tiny_config, tiny_data, tiny_network

import edm2.diffusion.model_file
import edm2.ema.storage.tensorfile
import edm2.train.checkpoint
import edm2.train.outputs
from edm2.generate.live_samples import LiveSamples
from edm2.train import Stopped, TrainConfig, Trainer, train

DATA = tiny_data()
CONFIG = tiny_config(num_images=96, snapshot_images=48, network=tiny_network(attn_resolutions=(4,)))
FULL = dataclasses.replace(CONFIG, sharding="full")

OnStep = Callable[[Trainer], None]


def group(size: int, out: Path, config: TrainConfig = CONFIG, on_step: OnStep | None = None) -> list[int]:
    """Exit codes of the processes of a run: 0 done, 75 stopped."""

    def work() -> None:
        try:
            train(config, out, dataset=DATA, quiet=True, on_step=on_step)
        except Stopped:
            sys.stderr.flush()
            os._exit(75)

    return in_processes(size, work)


def stop_on(rank: int, num_images: int) -> OnStep:
    def on_step(trainer: Trainer) -> None:
        if trainer.world.rank == rank and trainer.num_images == num_images:
            signal.raise_signal(signal.SIGTERM)

    return on_step


def fails_while_saving(what: str, how: Callable[[], None]) -> OnStep:
    """The second process fails in its part of the second checkpoint, or of the snapshot after it; the first while it
    writes the model."""

    def on_step(trainer: Trainer) -> None:
        if what == "model" and trainer.world.is_first:
            edm2.diffusion.model_file.write_tensors = lambda *_: how()  # type: ignore[assignment]
        elif what != "model" and trainer.world.rank == 1 and trainer.num_images == 72:
            if what == "checkpoint":
                edm2.train.checkpoint.write_json = lambda *_: how()  # type: ignore[assignment]
            else:
                edm2.ema.storage.tensorfile.DataSum.add = lambda *_, **__: how()  # type: ignore[method-assign]

    return on_step


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def main(folder: Path) -> None:
    train(CONFIG, folder / "one", dataset=DATA, quiet=True)
    for name, config in (("ddp", CONFIG), ("fsdp", FULL)):
        assert group(2, folder / name, config) == [0, 0], name
        micro = dataclasses.replace(config, microbatch=2)
        assert group(2, folder / f"{name}-micro", micro) == [0, 0], name
        for size in (1, 2, 4):
            out = folder / f"{name}-then-{size}"
            assert group(2, out, config, stop_on(1, 56)) == [75, 75], name
            assert group(size, out, config) == [0] * size, name
    for what in ("checkpoint", "snapshot"):
        out = folder / f"fsdp-no-space-{what}"
        assert group(2, out, FULL, fails_while_saving(what, no_space)) == [1, 1]
        assert len(list((out / "checkpoints").glob("0*"))) == 1
        assert group(2, out, FULL) == [0, 0]
        out = folder / f"fsdp-killed-{what}"
        kill = fails_while_saving(what, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert group(2, out, FULL, kill) == [1, -signal.SIGKILL]
        assert group(2, out, FULL) == [0, 0]
    out = folder / "fsdp-no-space-model"
    assert group(2, out, FULL, fails_while_saving("model", no_space)) == [1, 1]
    assert group(2, out, FULL) == [0, 0]
    live = LiveSamples(every=48, num_samples=3, num_steps=2)
    assert group(2, folder / "fsdp-seen", FULL, live) == [0, 0]


def killed(folder: Path) -> None:
    def on_step(trainer: Trainer) -> None:
        first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_life and trainer.world.rank == 1 and trainer.num_images == 72:
            os.kill(os.getpid(), signal.SIGKILL)

    train(CONFIG, folder / "killed", dataset=DATA, quiet=True, on_step=on_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Files of several processes are compared, between whose starts somebody may commit.
    edm2.train.outputs.git_state = lambda: None
    where = Path(sys.argv[1])
    killed(where) if "killed" in sys.argv[2:] else main(where)
