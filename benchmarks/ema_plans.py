"""Size and error of plans, error of thinned folders, and distance of weights from their averages.

    python benchmarks/ema_plans.py

Errors of plans are computed, not measured. The last table is measured in a training of a small network of
config G on digits.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from common import machine
from ema_accuracy import DTYPES, PAIR, WIDTHS, distance, exact, training

from edm2.ema import PLANS, Plan
from edm2.ema.maths.plans import best_errors, spread, times_to_keep
from edm2.train.config_groups import EMAConfig

_WANTED = spread((0.03, 0.25), 61)


def print_plans(num_params: int) -> None:
    """Bytes and errors of the plans with names, beside the paper's pair at fewer times."""
    trainer = Plan(name="the trainer's default", sigma_rels=EMAConfig().sigma_rels, times=_even(2))
    pairs = [Plan(name=f"the pair at {n}", sigma_rels=PAIR, times=_even(n)) for n in (64, 32, 16, 4)]
    paper = PLANS["paper"].storage_bytes(num_params)
    print(f"\nBytes are those of {num_params:,} parameters in fp32.\n")
    print(
        "| plan | tracks | times | files | storage | part of the paper's | worst error, fp32 | fp16 | bf16 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for plan in [*PLANS.values(), trainer, *pairs]:
        size = plan.storage_bytes(num_params)
        errors = " | ".join(f"{replace(plan, dtype=d).worst_error():.2g}" for d in DTYPES)
        print(
            f"| {plan.name} | {len(plan.sigma_rels)} | {len(plan.times)} | {plan.num_files} | {size / 1e9:.3g} GB"
            f" | 1/{paper / size:.3g} | {errors} |"
        )


def print_thinning(counts: Sequence[int]) -> None:
    """Worst error of a thinned folder, relative to that of equally many even times."""
    print("\n| tracks | times kept | even times | thinned / even, largest | median |")
    print("|---|---|---|---|---|")
    for name in ("paper", "lean", "small"):
        for count in counts:
            even = _worst(_even(count), PLANS[name].sigma_rels)
            ratios = np.array(thinned_errors(PLANS[name].sigma_rels, count)) / even
            print(f"| {name} | {count} | {even:.2g} | {ratios.max():.2f} | {np.median(ratios):.2f} |")


def thinned_errors(sigma_rels: Sequence[float], count: int, *, most: int = 240) -> list[float]:
    """Worst error at every time once five times as many were stored as are kept."""
    kept: list[float] = []
    errors = []
    for t in range(1, max(most, 8 * count) + 1):
        kept = times_to_keep([*kept, float(t)], sigma_rels, count)
        if t >= 5 * count:
            errors.append(_worst([x / t for x in kept], sigma_rels))
    return errors


def print_distances(steps: int) -> None:
    """Relative L2 distance of the weights from their exact averages while a network learns."""
    path = training(steps)
    print(f"\nDistance of the weights from their averages, {path.shape[1]:,} weights, {steps} steps.\n")
    print("| step | " + " | ".join(f"{width:g}" for width in WIDTHS) + " |")
    print("|---|" + "---|" * len(WIDTHS))
    for t in (steps // 4, steps // 2, steps):
        averages = exact(path, 1, t, WIDTHS)
        print(f"| {t} | " + " | ".join(f"{distance(path[t - 1], a):.1%}" for a in averages) + " |")


def _worst(times: Sequence[float], sigma_rels: Sequence[float]) -> float:
    return float(best_errors(times, sigma_rels, 1.0, _WANTED, "fp32")[0].max())


def _even(count: int) -> tuple[float, ...]:
    return tuple((i + 1) / count for i in range(count))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--params", type=int, default=280_000_000, help="parameters of the model in the first table"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[2, 4, 8, 16], help="times kept in the second"
    )
    parser.add_argument("--steps", type=int, default=1500, help="length of the training for the third")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    print_plans(args.params)
    print_thinning(args.counts)
    print_distances(args.steps)


if __name__ == "__main__":
    main()
