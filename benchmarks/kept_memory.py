"""What it gains on a CPU that a process keeps memory that it has freed, measured in processes that take turns.

python benchmarks/kept_memory.py                     # 1.7M parameters at 32x32x1, batch 64, float32
python benchmarks/kept_memory.py --steps 1 --rounds 1 --model-channels 8 --batch 2  # a quick try
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import machine, options

from edm2.data import ArrayDataset
from edm2.memory import keep_freed_memory
from edm2.train import NetworkConfig, TrainConfig, Trainer


def measure(arguments, folder):
    """Processor time and page faults of a step, and the peak of memory."""
    rng = np.random.default_rng(0)
    dataset = ArrayDataset(rng.integers(0, 256, (512, 1, 32, 32), dtype=np.uint8), np.arange(512) % 10)
    channels = arguments.model_channels
    network = NetworkConfig(
        model_channels=channels,
        channel_mult=(1, 2, 2),
        num_blocks=2,
        attn_resolutions=(8,),
        channels_per_head=channels,
    )
    config = TrainConfig(num_images=1 << 30, batch_size=arguments.batch, device="cpu", network=network)
    trainer = Trainer(config, dataset, Path(folder) / "run")
    for _ in range(3):
        trainer.step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(arguments.steps):
        trainer.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    trainer.close()
    used = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    return (
        f"{sum(used) / arguments.steps:.3f} s a step, {used[1] / arguments.steps:.3f} s of it in the system, "
        f"{(after.ru_minflt - before.ru_minflt) // arguments.steps:,} page faults, "
        f"peak {after.ru_maxrss // 1024:,} MB"
    )


def main():
    arguments = options(__doc__, model_channels=32, batch=64, steps=5, rounds=3, only="")
    if arguments.only:
        if arguments.only == "kept":
            keep_freed_memory()
        with tempfile.TemporaryDirectory() as folder:
            print(measure(arguments, folder))
        return
    print(machine(torch.device("cpu")))
    for _ in range(arguments.rounds):
        for name in ("returned", "kept"):
            words = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            print(f"{name:<9} {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
