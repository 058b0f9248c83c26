"""Memory and time of a sharded run's snapshots, model and checkpoints: what a process needs beyond its part.

    python benchmarks/checkpoint_memory.py --million 200 --processes 2 4

Processes of gloo on this machine train one step with --sharding full, write a snapshot of the averages, the final
model and a checkpoint, and resume. Peak memory is what a process holds at most meanwhile beyond what it held before
(Linux only). Its part is that of weights, moments and averages.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import machine

from edm2.data import ArrayDataset
from edm2.ema.tracking.sharding import local
from edm2.train import NetworkConfig, TrainConfig, Trainer
from edm2.train.world import World, join_world


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--million", type=int, default=200, help="millions of parameters, about")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    print(machine(torch.device("cpu")))
    for size in arguments.processes:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), size, arguments.million)
        for rank, process in enumerate(found):
            mega = {key: value / 1e6 for key, value in process.items()}
            print(
                f"process {rank + 1} of {size}: part {mega['part']:.0f} MB of {mega['all']:.0f}, largest tensor "
                f"{mega['largest']:.1f} MB; snapshot +{mega['snapshot']:.1f} MB, {process['snapshot_s']:.1f} s; model "
                f"+{mega['model']:.1f} MB, {process['model_s']:.1f} s; saving "
                f"+{mega['save']:.1f} MB, {process['save_s']:.1f} s; resuming +{mega['resume']:.1f} MB, "
                f"{process['resume_s']:.1f} s"
            )


def network_width(million: int) -> int:
    """Channels of a network of about so many parameters: config G has 280 million at 192."""
    return max(16, round((million / 280) ** 0.5 * 12) * 16)


def measure(folder: Path, size: int, million: int) -> list[dict[str, float]]:
    """What each process measured; bytes and seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            with join_world("cpu") as world:
                work(folder, world, million)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def work(folder: Path, world: World, million: int) -> None:
    """Train a step, write a snapshot, save and resume."""
    config = TrainConfig(
        num_images=1 << 20, batch_size=world.size, sharding="full", record_magnitudes=False, workers=0, device="cpu",
        network=NetworkConfig(model_channels=network_width(million), attn_resolutions=(), channels_per_head=16),
    )  # fmt: skip
    data = ArrayDataset(np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8))
    trainer = Trainer(config, data, folder / "run", world=world)
    trainer.step()
    average = trainer.ema.state_dict()
    tensors = [*trainer.denoiser.state_dict().values(), *(v for v in average.values() if torch.is_tensor(v))]
    for state in trainer.optimizer.state.values():
        tensors += state.values()
    part = sum(local(x).nbytes for x in tensors)
    whole, largest = sum(x.nbytes for x in tensors), max(x.nbytes for x in tensors)
    del tensors, average

    def save() -> None:
        trainer.checkpoint()
        trainer._outputs.saver.wait()

    snapshot_peak, snapshot_seconds = peak(trainer.snapshot)
    model_peak, model_seconds = peak(trainer.finish)
    save_peak, save_seconds = peak(save)
    trainer.close()
    world.any(False)
    resumed = Trainer(config, data, folder / "run", world=world)
    resume_peak, resume_seconds = peak(resumed.resume)
    content = dict(part=part, all=whole, largest=largest, snapshot=snapshot_peak, snapshot_s=snapshot_seconds,
                   model=model_peak, model_s=model_seconds, save=save_peak, save_s=save_seconds,
                   resume=resume_peak, resume_s=resume_seconds)  # fmt: skip
    (folder / f"{world.rank}.json").write_text(json.dumps(content))


def peak(function: Callable[[], None]) -> tuple[int, float]:
    """Bytes by which memory of its own rises at most, and seconds; pages of files, which the system can drop, are not
    its own."""
    before, start, highest, done = own_bytes(), time.perf_counter(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return max(highest[0] - before, 0), seconds


def own_bytes() -> int:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
