"""Starting from weights: digits 0 to 4 first, then 5 to 9, against 5 to 9 from scratch.

Prints the Frechet distance to digits 5 to 9 after the same numbers of images, and how many of them the run that
starts from weights needs for the best distance of the one from scratch.

    python benchmarks/finetune.py
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, options

from edm2.data import ArrayDataset, open_dataset
from edm2.evaluation.judge import Judge
from edm2.generate import ImageGenerator
from edm2.presets import get_preset
from edm2.train import TrainConfig, train

MOMENTS = 12


def half(low: int) -> ArrayDataset:
    """Five of the ten digits, as classes 0 to 4."""
    digits = open_dataset("digits")
    labels = digits.labels(np.arange(len(digits)))
    rows = np.flatnonzero((labels >= low) & (labels < low + 5))
    return ArrayDataset(digits.images(rows), labels[rows] - low, name=f"digits {low} to {low + 4}")


def settings(images: int, **changes: object) -> TrainConfig:
    preset = get_preset("digits")
    network = dataclasses.replace(preset.network, model_channels=16, channels_per_head=16)
    return dataclasses.replace(
        preset, num_images=images, snapshot_images=images // MOMENTS, network=network, **changes
    )


def distances(run: Path, judge: Judge, images: int, samples: int) -> list[float]:
    moments = [images // MOMENTS * (i + 1) for i in range(MOMENTS)]
    options = {"num_steps": 8, "sampler": "dpmpp-2m"}
    generators = (ImageGenerator.load(run, 0.1, num_images=t) for t in moments)
    return [judge.distance(g.images(range(samples), **options)) for g in generators]


def main() -> None:
    given = options(__doc__ or "", images=6144, samples=500, rate=0.01)
    first, second = half(0), half(5)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        train(settings(given.images), out / "first", dataset=first, quiet=True)
        train(settings(given.images, seed=1), out / "scratch", dataset=second, quiet=True)
        model = str(out / "first")
        tuned = settings(given.images, seed=1, init=model)
        tuned = dataclasses.replace(tuned, optimizer=dataclasses.replace(tuned.optimizer, ref_lr=given.rate))
        train(tuned, out / "tuned", dataset=second, quiet=True)
        judge = Judge(second)
        scratch, started = (
            distances(out / name, judge, given.images, given.samples) for name in ("scratch", "tuned")
        )
    print(f"{machine(torch.device('cpu'))}; {time.perf_counter() - start:.0f} s")
    print(f"{'images':>8}  {'scratch':>8}  {'init':>8}")
    for i, (a, b) in enumerate(zip(scratch, started, strict=True)):
        print(f"{given.images // MOMENTS * (i + 1):>8}  {a:>8.3f}  {b:>8.3f}")
    best = min(scratch)
    reached = next((i + 1 for i, b in enumerate(started) if b <= best), None)
    needed = scratch.index(best) + 1
    share = "never" if reached is None else f"in {reached}/{needed} of the images"
    print(f"best from scratch {best:.3f}, reached {share}")


if __name__ == "__main__":
    main()
