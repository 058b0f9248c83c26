"""Quality against evaluations: a student of `edm2 distill` beside its teacher with Heun, DPM-Solver++ 2M and Euler.

    python benchmarks/few_steps.py --student runs/student
    python benchmarks/few_steps.py --student runs/student --commands 3 --images 3000    # whole commands, in turns

Prints the Frechet distance in the features of a classifier trained on the run's own images (mean and range over sets
of images with seeds of their own), the share of images in which an independent classifier sees the intended class, and
images per second, network and sampler alone, in turns. `--length` chooses the student's EMA length; by default it is
the tuned one, if the run was tuned, else the longest.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import commands_in_turns, in_turns, machine, options

from edm2.evaluation.judge import Judge
from edm2.generate import ImageGenerator
from edm2.metrics import label_agreement
from edm2.train.build import open_run_data
from edm2.train.consistency import Teacher
from edm2.train.run_folder import SNAPSHOTS, TEACHER
from edm2.train.settings_file import run_settings
from edm2.tuning.result import read_tuned

_SEED = 4_000_000  # of the first set; `edm2 tune` measures from there, too
Images = Callable[[range], np.ndarray]


def main() -> None:
    arguments = options(
        __doc__, student="runs/student", images=1000, sets=3, length=0.0, evaluations=(1, 2, 3, 4), steps=(8, 16, 32),
        seed=_SEED, speed=True, commands=0, teacher=True,
    )  # fmt: skip
    run = Path(arguments.student)
    if arguments.commands:
        return whole_commands(run, arguments.images, arguments.commands)
    ways = (teacher_ways(run, arguments.steps) if arguments.teacher else {}) | student_ways(
        run, arguments.length, arguments.evaluations
    )
    data = open_run_data(run)
    rows = np.arange(len(data))
    real, labels, judge = data.images(rows), data.labels(rows), Judge(data)
    print(f"{arguments.sets} sets of {arguments.images} images; {machine(torch.device('cpu'))}")
    speeds = dict.fromkeys(ways, 0.0)
    if arguments.speed:
        few = range(arguments.seed, arguments.seed + 250)
        seconds = in_turns(
            {name: lambda make=make: make(few) for name, (_, make) in ways.items()}, torch.device("cpu"), 3
        )
        speeds = {name: len(few) / statistics.median(times) for name, times in seconds.items()}
    print("| | evaluations | Frechet distance | recognised | images/s |\n|---|---:|---:|---:|---:|")
    for name, (evaluations, make) in ways.items():
        distances, seen = [], []
        for k in range(arguments.sets):
            seeds = range(arguments.seed + k * arguments.images, arguments.seed + (k + 1) * arguments.images)
            made = make(seeds)
            distances.append(judge.distance(made))
            seen.append(label_agreement(real, labels, made, np.asarray(seeds) % data.num_classes))
        quality = f"{statistics.fmean(distances):.3f} ({min(distances):.3f} to {max(distances):.3f})"
        recognised = f"{100 * statistics.fmean(seen):.1f}%"
        print(f"| {name} | {evaluations} | {quality} | {recognised} | {speeds[name]:.0f} |", flush=True)


def whole_commands(run: Path, images: int, rounds: int) -> None:
    """Print images per processor second of `edm2 sample`: the teacher, published sampler, and two evaluations."""
    seeds = ["--seeds", f"0-{images - 1}"]
    seconds = commands_in_turns(
        {
            "teacher": [str(run / TEACHER), "--sampler", "heun", *seeds],
            "student": [str(run), "--num-steps", "2", *seeds],
        },
        rounds,
    )
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["teacher"], values, strict=True))
        print(f"{name}: {images / statistics.median(values):.0f} images/s, {ratio:.1f}x")


def teacher_ways(run: Path, steps: tuple[int, ...]) -> dict[str, tuple[int, Images]]:
    """The teacher, guided as the student learned it, with each sampler and number of noise levels."""
    teacher, chosen = Teacher.load(run), run_settings(run).consistency
    assert chosen is not None, f"{run} is not a student's run"
    guided: dict[str, Any] = {}
    if teacher.guide is not None:
        guided = {
            "guide": teacher.guide_for_sampling,
            "guidance": chosen["guidance"],
            "interval": tuple(chosen["interval"]),
        }
    model = ImageGenerator(teacher.model, teacher.coding, teacher.info, fix_weights=True)
    found: dict[str, tuple[int, Images]] = {}
    for sampler in ("heun", "dpmpp-2m", "dpmpp-3m", "euler"):
        for count in steps:
            asked = {"sampler": sampler, "num_steps": count, **guided}
            evaluations = 2 * count - 1 if sampler == "heun" else count
            found[f"teacher, {sampler} {count}"] = (
                evaluations,
                lambda s, asked=asked: model.images(s, **asked),
            )
    return found


def student_ways(run: Path, length: float, counts: tuple[int, ...]) -> dict[str, tuple[int, Images]]:
    """The student with each number of evaluations."""
    tuned = read_tuned(run)
    best = None if tuned is None or not tuned.is_better else tuned.best
    sigma_rel = length or (best.sigma_rel if best is not None else None)
    source = run / SNAPSHOTS if sigma_rel is not None else run
    model = ImageGenerator.load(source, sigma_rel)
    found: dict[str, tuple[int, Images]] = {}
    for count in counts:
        levels = None if best is None or len(best.levels or ()) != count - 1 else best.levels
        found[f"student {count}"] = (
            count,
            lambda s, count=count, levels=levels: model.images(s, num_steps=count, levels=levels),
        )
    return found


if __name__ == "__main__":
    main()
