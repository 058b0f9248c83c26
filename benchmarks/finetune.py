"""Starting from weights: digits 0 to 4 first, then 5 to 9, against 5 to 9 from scratch.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --rates 0.01 0.03 --ramps 0.0005 0.002 --seeds 0

Prints the Frechet distance to digits 5 to 9 after the same numbers of images, each with the best of a few EMA lengths,
and after which share of the images the run that starts from weights is as good as the one from scratch at its best.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine

from edm2.data import ArrayDataset, open_dataset
from edm2.evaluation.judge import Judge
from edm2.generate import ImageGenerator
from edm2.presets import get_preset
from edm2.train import TrainConfig, train

MOMENTS = 12
LENGTHS = (0.1, 0.2)


def half(low: int) -> ArrayDataset:
    """Five of the ten digits; 5 to 9 are five further classes."""
    digits = open_dataset("digits")
    labels = digits.labels(np.arange(len(digits)))
    rows = np.flatnonzero((labels >= low) & (labels < low + 5))
    return ArrayDataset(digits.images(rows), labels[rows], name=f"digits {low} to {low + 4}")


def settings(images: int, **changes: object) -> TrainConfig:
    preset = get_preset("digits")
    network = dataclasses.replace(preset.network, model_channels=16, channels_per_head=16)
    return dataclasses.replace(
        preset, num_images=images, snapshot_images=images // MOMENTS, network=network, **changes
    )


def distances(run: Path, judge: Judge, images: int, samples: int) -> list[float]:
    """The lowest distance of all lengths, at each moment."""
    found, labels = [], 5 + np.arange(samples) % 5
    for moment in range(1, MOMENTS + 1):
        generators = (ImageGenerator.load(run, x, num_images=images // MOMENTS * moment) for x in LENGTHS)
        made = (g.images(range(samples), labels, num_steps=8, sampler="dpmpp-2m") for g in generators)
        found.append(min(map(judge.distance, made)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=12_288, help="images of digits 0 to 4")
    parser.add_argument("--images", type=int, default=6144, help="images of digits 5 to 9")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03])
    parser.add_argument(
        "--ramps", type=float, nargs="+", default=[0.0005], help="ramp-up in millions of images"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    first, second = half(0), half(5)
    judge = Judge(second)
    start = time.process_time()
    curves: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            out = Path(folder) / str(seed)
            train(settings(given.first, seed=seed), out / "first", dataset=first, quiet=True)
            plain = settings(given.images, seed=seed + 100)
            runs = {}
            for ramp in given.ramps:
                optimizer = dataclasses.replace(plain.optimizer, rampup_mimg=ramp)
                scratch = dataclasses.replace(plain, optimizer=optimizer)
                runs[f"scratch, ramp {ramp:g}"] = scratch
                for rate in given.rates:
                    optimizer = dataclasses.replace(optimizer, ref_lr=rate)
                    started = dataclasses.replace(plain, optimizer=optimizer, init=str(out / "first"))
                    runs[f"rate {rate:g}, ramp {ramp:g}"] = started
            for name, config in runs.items():
                train(config, out / name, dataset=second, quiet=True)
                found = distances(out / name, judge, given.images, given.samples)
                curves.setdefault(name, []).append(found)
                print(f"seed {seed}, {name}: {' '.join(f'{d:.2f}' for d in found)}", flush=True)
    print(f"{machine(torch.device('cpu'))}; {time.process_time() - start:.0f} s of CPU time")
    means = {
        name: [statistics.fmean(at) for at in zip(*found, strict=True)] for name, found in curves.items()
    }
    print(f"{'images':>8}  " + "  ".join(f"{name:>22}" for name in means))
    for i, row in enumerate(zip(*means.values(), strict=True)):
        print(f"{given.images // MOMENTS * (i + 1):>8}  " + "  ".join(f"{d:>22.3f}" for d in row))
    best = min(min(mean) for name, mean in means.items() if name.startswith("scratch"))
    for name, mean in means.items():
        reached = next((i + 1 for i, d in enumerate(mean) if d <= best), None)
        share = "never" if reached is None else f"after {reached}/{MOMENTS} of the images"
        print(f"{name}: best from scratch, {best:.3f}, reached {share}")


if __name__ == "__main__":
    main()
