"""Quality against evaluations: students of `edm2 distill` beside their teacher with each sampler.

    python benchmarks/few_steps.py runs/student --out curve
    python benchmarks/few_steps.py runs/student0 runs/student1 --levels 32 --samplers heun --sets 5 --out ratios
    python benchmarks/few_steps.py runs/student --commands 3 --images 3000    # whole commands, in turns

Prints the Frechet distance in the features of a classifier trained on the run's own images, the share of images in
which an independent classifier sees the intended class, and the ratio to the teacher with Heun's 32 levels on the same
seeds, with its 95% confidence interval over the sets. Students of one teacher that differ in their seed share a line.
Writes into the folder: scores.json, from which a repeated command takes what was measured, the picture of the curve,
and images of teacher and student from the same seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import commands_in_turns, machine

from edm2.evaluation.judge import Judge
from edm2.files import replacing
from edm2.generate import ImageGenerator
from edm2.metrics import label_agreement
from edm2.report.grids import image_grid, save_png
from edm2.report.style import SERIES, figure_png, new_figure
from edm2.train.build import open_run_data
from edm2.train.consistency import Teacher
from edm2.train.run_folder import SNAPSHOTS, TEACHER
from edm2.train.settings_file import run_settings
from edm2.tuning.result import half_interval

_STUDENT = "student"
_REFERENCE = ("heun", 63)
_TRAIN = 5000  # images of the classifier that recognises, at most
_SHOWN = range(10)  # seeds of the picture
Way = tuple[str, int]  # sampler and evaluations
Images = Callable[[range], np.ndarray]
Score = tuple[float, float]  # Frechet distance, share recognised


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("students", type=Path, nargs="+", help="runs of students of one teacher")
    parser.add_argument("--out", type=Path, default=Path("few_steps"), help="folder of scores and pictures")
    parser.add_argument("--length", type=float, default=0.1, help="EMA length of the students")
    parser.add_argument("--evaluations", type=int, nargs="*", default=[1, 2, 4, 8], help="of the students")
    parser.add_argument("--samplers", nargs="*", default=["heun", "dpmpp-2m", "dpmpp-3m", "euler"])
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="of the teacher")
    parser.add_argument("--images", type=int, default=1000, help="in a set")
    parser.add_argument("--sets", type=int, default=1)
    parser.add_argument("--seed", type=int, default=4_000_000, help="first of the first set")
    parser.add_argument("--commands", type=int, default=0, help="rounds of whole commands instead")
    arguments = parser.parse_args()
    if arguments.commands:
        return whole_commands(arguments.students[0], arguments.images, arguments.commands)
    teacher = teacher_ways(arguments.students[0], arguments.samplers, arguments.levels)
    students = [student_ways(run, arguments.length, arguments.evaluations) for run in arguments.students]
    arguments.out.mkdir(parents=True, exist_ok=True)
    scores = Scores(arguments.students[0], arguments.out / "scores.json", arguments.images)
    starts = [arguments.seed + k * arguments.images for k in range(arguments.sets)]
    found: dict[Way, list[list[Score]]] = {}  # of each way, for each set and model
    for way, make in teacher.items():
        found[way] = [[scores.of("teacher", way, make, start)] for start in starts]
    for way in students[0]:
        names = [str(run) for run in arguments.students]
        found[way] = [
            [scores.of(name, way, made[way], start) for name, made in zip(names, students, strict=True)]
            for start in starts
        ]
    print_table(found)
    print(f"{arguments.sets} sets of {arguments.images} images; {machine(torch.device('cpu'))}")
    (arguments.out / "curve.png").write_bytes(curve(found))
    rows = [teacher[_REFERENCE]] if _REFERENCE in teacher else []
    rows += [make for (_, count), make in sorted(students[0].items(), reverse=True) if count <= 4]
    pictures = np.concatenate([make(_SHOWN) for make in rows])
    scale = math.ceil(48 / pictures.shape[-1])
    save_png(image_grid(pictures, columns=len(_SHOWN), scale=scale), arguments.out / "seeds.png")


class Scores:
    """Scores of sets of images, kept in a file.

    Args:
        run: A run on the images that are compared with.
        path: The file.
        images: Images in a set.
    """

    def __init__(self, run: Path, path: Path, images: int) -> None:
        self._data, self._path, self._images = open_run_data(run), path, images
        self._kept: dict[str, Score] = json.loads(path.read_text()) if path.exists() else {}
        self._judge: Judge | None = None

    def of(self, model: str, way: Way, make: Images, start: int) -> Score:
        """The score of the images of a model whose seeds begin at `start`."""
        key = f"{model}, {way[0]}, {way[1]} evaluations, {self._images} images from seed {start}"
        if key not in self._kept:
            self._kept[key] = self._measure(make(range(start, start + self._images)), start)
            with replacing(self._path) as file:
                file.write(json.dumps(self._kept, indent=1).encode())
            print(key, *self._kept[key], flush=True)
        distance, seen = self._kept[key]
        return distance, seen

    def _measure(self, images: np.ndarray, start: int) -> Score:
        if self._judge is None:
            rows = np.arange(0, len(self._data), math.ceil(len(self._data) / _TRAIN))
            self._judge = Judge(self._data)
            self._real = self._data.images(rows), self._data.labels(rows)
        labels = np.arange(start, start + self._images) % self._data.num_classes
        return self._judge.distance(images), label_agreement(*self._real, images, labels)


def print_table(found: dict[Way, list[list[Score]]]) -> None:
    """Means over sets and models, and ratios to the reference set by set."""
    print("| | evaluations | Frechet distance | of single sets | recognised | times the teacher's |")
    print("|---|---:|---:|---:|---:|---:|")
    for (name, count), sets in found.items():
        distances = [distance for models in sets for distance, _ in models]
        seen = statistics.fmean(share for models in sets for _, share in models)
        ratio = ""
        if _REFERENCE in found:
            logs = [
                math.log(statistics.fmean(d for d, _ in models) / reference)
                for models, [(reference, _)] in zip(sets, found[_REFERENCE], strict=True)
            ]
            mean, error = statistics.fmean(logs), half_interval(logs)
            ratio = f"{math.exp(mean):.2f}"
            if error:
                ratio += f" ({math.exp(mean - error):.2f} to {math.exp(mean + error):.2f})"
        extent = f"{min(distances):.2f} to {max(distances):.2f}" if len(distances) > 1 else ""
        print(
            f"| {name} | {count} | {statistics.fmean(distances):.2f} | {extent} | {100 * seen:.1f}% | {ratio} |"
        )


def curve(found: dict[Way, list[list[Score]]]) -> bytes:
    """Draw distance against evaluations, with the extent of single sets, as PNG."""
    figure, (ax,) = new_figure(height=3.6)
    names = list(dict.fromkeys(name for name, _ in reversed(found)))
    for name, color in zip(names, SERIES, strict=False):
        counts, values = zip(
            *((n, [d for models in sets for d, _ in models]) for (m, n), sets in found.items() if m == name),
            strict=True,
        )
        style = {"color": color, "zorder": 4 if name == _STUDENT else 3}
        ax.plot(
            counts,
            [statistics.fmean(v) for v in values],
            marker="o",
            markersize=3.2,
            linewidth=1.7,
            label=name,
            **style,
        )
        ax.vlines(counts, [min(v) for v in values], [max(v) for v in values], linewidth=1.0, **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("evaluations of the network for an image")
    ax.set_ylabel("Frechet distance")
    ax.legend(frameon=False)  # in the empty corner: many evaluations are never poor
    return figure_png(figure)


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


def teacher_ways(run: Path, samplers: Sequence[str], levels: Sequence[int]) -> dict[Way, Images]:
    """The teacher, guided as the student learned it, with each sampler and number of noise levels."""
    teacher, chosen = Teacher.load(run), run_settings(run).consistency
    assert chosen is not None, f"{run} is not a student's run"
    guided: dict[str, Any] = {}
    if teacher.guide is not None:
        guided = {
            "guide": teacher.guide_for_sampling,
            "guidance": chosen.guidance,
            "interval": chosen.interval,
        }
    model = ImageGenerator(teacher.model, teacher.coding, teacher.info, fix_weights=True)
    found: dict[Way, Images] = {}
    for sampler in samplers:
        for count in levels:
            asked = {"sampler": sampler, "num_steps": count, **guided}
            evaluations = 2 * count - 1 if sampler == "heun" else count
            found[sampler, evaluations] = lambda seeds, asked=asked: model.images(seeds, **asked)
    return found


def student_ways(run: Path, length: float, counts: Sequence[int]) -> dict[Way, Images]:
    """The student with each number of evaluations."""
    model = ImageGenerator.load(run / SNAPSHOTS, length)
    return {
        (_STUDENT, count): lambda seeds, count=count: model.images(seeds, num_steps=count) for count in counts
    }


if __name__ == "__main__":
    main()
