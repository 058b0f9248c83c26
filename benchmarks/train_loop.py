"""Cost of the whole training loop relative to the bare training step, with and without recorded magnitudes.

    python benchmarks/train_loop.py                     # 1.7M parameters at 32x32x1, batch 64
    python benchmarks/train_loop.py --steps 10 --log-steps 10 --rounds 3 --model-channels 8 --batch 8  # a quick try

The bare step: forward and backward pass, Adam and weight normalisation on a batch in memory. The loop adds
data, noise, the averages, the log, and a snapshot and a checkpoint every `--save-steps` steps; with
magnitudes, one step in `--log-steps` is recorded. All three take turns; every round has the same number of
recorded steps.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import in_turns, machine, options
from train_step import Step

from edm2.data import ArrayDataset
from edm2.train import NetworkConfig, TrainConfig, Trainer


class Pause(Exception):
    """Leaves the loop between two steps."""


def pause_at(num_images, trainer):
    if trainer.num_images >= num_images:
        raise Pause


def main():
    arguments = options(
        __doc__,
        resolution=32, channels=1, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention=(8,),
        batch=64, steps=50, save_steps=500, log_steps=50, rounds=5,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    batch, device = arguments.batch, torch.device(arguments.device)
    if arguments.steps % arguments.log_steps:
        raise SystemExit(
            "--steps must be a multiple of --log-steps: rounds would record different numbers of steps"
        )
    shape = (arguments.channels, arguments.resolution, arguments.resolution)
    rng = np.random.default_rng(0)
    dataset = ArrayDataset(rng.integers(0, 256, (4096, *shape), dtype=np.uint8), np.arange(4096) % 10)
    config = TrainConfig(
        num_images=1 << 40,
        batch_size=batch,
        snapshot_images=arguments.save_steps * batch,
        checkpoint_images=arguments.save_steps * batch,
        log_images=arguments.log_steps * batch,
        device=arguments.device,
        network=NetworkConfig(
            model_channels=arguments.model_channels,
            channel_mult=tuple(arguments.channel_mult),
            num_blocks=arguments.num_blocks,
            attn_resolutions=tuple(arguments.attention),
            channels_per_head=min(64, arguments.model_channels),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        recording, plain = (
            Trainer(
                dataclasses.replace(config, record_magnitudes=record), dataset, Path(folder) / str(record)
            )
            for record in (True, False)
        )
        ready = (
            0.5 * torch.randn(batch, *shape, device=device),
            torch.arange(batch, device=device) % 10,
            torch.exp(torch.randn(batch, device=device) - 0.4),
            torch.randn(batch, *shape, device=device),
        )
        step = Step(plain.denoiser, ready, quick=True)

        def bare():
            for _ in range(arguments.steps):
                step()

        def loop(trainer):
            stop = trainer.num_images + arguments.steps * batch
            with contextlib.suppress(Pause):
                trainer.run(quiet=True, on_step=lambda trainer: pause_at(stop, trainer))

        rounds = {"bare step": bare, "loop": lambda: loop(plain), "with magnitudes": lambda: loop(recording)}
        times = in_turns(rounds, device, arguments.rounds)
        for trainer in (plain, recording):
            trainer.close()
    print(machine(device))
    for name, seconds in times.items():
        print(f"{name:<16} {arguments.steps * batch / float(np.median(seconds)):>9.1f} images/s")
    print(f"the loop takes   {compared(times['bare step'], times['loop'])}")
    print(f"magnitudes take  {compared(times['loop'], times['with magnitudes'])}, ", end="")
    print(f"one step in {arguments.log_steps} recorded")


def compared(before, after):
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return f"{100 * (float(np.median(ratios)) - 1):+.1f}% (rounds {', '.join(f'{r:.3f}' for r in ratios)})"


if __name__ == "__main__":
    main()
