"""Starting from weights: digits 0 to 4 first, then 5 to 9, against 5 to 9 from scratch.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --rates 0.02 0.03 --ramps 0 0.0005 --seeds 0 --picture curves.png

Prints the Frechet distance to digits 5 to 9 after the same numbers of images, each with the best of a few EMA lengths,
and, for each moment of the run from scratch, the share of its images after which the run that starts from weights is as
good.
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
SCRATCH_RAMP = 0.0005  # millions of images; 0 changes the run from scratch little
Curves = dict[str, list[list[float]]]


def half(low: int) -> ArrayDataset:
    """Five of the ten digits; 5 to 9 are five further classes."""
    digits = open_dataset("digits")
    labels = digits.labels(np.arange(len(digits)))
    rows = np.flatnonzero((labels >= low) & (labels < low + 5))
    return ArrayDataset(digits.images(rows), labels[rows], name=f"digits {low} to {low + 4}")


def settings(
    images: int, *, rate: float = 0.03, ramp: float = SCRATCH_RAMP, **changes: object
) -> TrainConfig:
    preset = get_preset("digits")
    return dataclasses.replace(
        preset,
        num_images=images,
        snapshot_images=images // MOMENTS,
        network=dataclasses.replace(preset.network, model_channels=16, channels_per_head=16),
        optimizer=dataclasses.replace(preset.optimizer, ref_lr=rate, rampup_mimg=ramp),
        **changes,
    )


def distances(run: Path, judge: Judge, images: int, samples: int) -> list[float]:
    """The lowest distance of all lengths, at each moment."""
    found, labels = [], 5 + np.arange(samples) % 5
    for moment in range(1, MOMENTS + 1):
        generators = (ImageGenerator.load(run, x, num_images=images // MOMENTS * moment) for x in LENGTHS)
        made = (g.images(range(samples), labels, num_steps=8, sampler="dpmpp-2m") for g in generators)
        found.append(min(map(judge.distance, made)))
    return found


def needed(curve: list[float], goal: float) -> float:
    """Moments until a curve first reaches a distance, interpolated in its logarithm; nan if it does not."""
    at = next((i for i, d in enumerate(curve) if d <= goal), None)
    if at is None:
        return float("nan")
    if at == 0:
        return 1.0
    high, low = np.log(curve[at - 1]), np.log(curve[at])
    return float(at + (high - np.log(goal)) / (high - low))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=24_576, help="images of digits 0 to 4")
    parser.add_argument("--images", type=int, default=6144, help="images of digits 5 to 9")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03])
    parser.add_argument("--ramps", type=float, nargs="+", default=[0.0], help="ramp-up in millions of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--picture", type=Path, help="PNG file to draw the curves of the first rate and ramp-up into"
    )
    given = parser.parse_args()
    first, second = half(0), half(5)
    judge = Judge(second)
    start = time.process_time()
    curves: Curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            out = Path(folder) / str(seed)
            train(settings(given.first, seed=seed), out / "first", dataset=first, quiet=True)
            runs = {"scratch": settings(given.images, seed=seed + 100)}
            runs |= {
                f"rate {rate:g}, ramp {ramp:g}": settings(
                    given.images, seed=seed + 100, rate=rate, ramp=ramp, init=str(out / "first")
                )
                for rate in given.rates
                for ramp in given.ramps
            }
            for name, config in runs.items():
                train(config, out / name, dataset=second, quiet=True)
                found = distances(out / name, judge, given.images, given.samples)
                curves.setdefault(name, []).append(found)
                print(f"seed {seed}, {name}: {' '.join(f'{d:.2f}' for d in found)}", flush=True)
    print(f"{machine(torch.device('cpu'))}; {time.process_time() - start:.0f} s of CPU time")
    for name in list(curves)[1:]:
        compare(name, curves, given.images)
    if given.picture is not None:
        draw(curves, given.images, given.picture)


def compare(name: str, curves: Curves, images: int) -> None:
    """Print mean distances, and the share of the images from scratch that the run from weights needs."""
    print(f"{name}\n{'images':>8} {'scratch':>9} {'weights':>9}  share needed, mean and each seed")
    for i in range(MOMENTS):
        scratch, weights = ([curve[i] for curve in curves[key]] for key in ("scratch", name))
        shares = [needed(curve, goal) / (i + 1) for curve, goal in zip(curves[name], scratch, strict=True)]
        told = " ".join(f"{share:.2f}" for share in shares)
        print(
            f"{images // MOMENTS * (i + 1):>8} {statistics.fmean(scratch):>9.2f} {statistics.fmean(weights):>9.2f}  "
            f"{statistics.fmean(shares):.2f} ({told})"
        )
    best = [min(curve) for curve in curves["scratch"]]
    shares = [needed(curve, goal) / MOMENTS for curve, goal in zip(curves[name], best, strict=True)]
    print(
        f"best from scratch ({', '.join(f'{b:.2f}' for b in best)}): {', '.join(f'{s:.2f}' for s in shares)}"
    )


def draw(curves: Curves, images: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    moments = np.arange(1, MOMENTS + 1) * (images // MOMENTS)
    names = list(curves)
    for key, label, colour in ((names[0], "from scratch", "C3"), (names[1], "from weights", "C0")):
        for i, curve in enumerate(curves[key]):
            axes.plot(moments, curve, color=colour, lw=1, marker=".", label=label if i == 0 else None)
    axes.set(xlabel="images of digits 5 to 9", ylabel="Frechet distance", yscale="log")
    axes.set_yticks([2, 5, 10, 20, 40], labels=["2", "5", "10", "20", "40"])
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
