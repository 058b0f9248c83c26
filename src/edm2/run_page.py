"""The page about one training run, or about several side by side."""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data import ImageDataset
from edm2.ema import reconstruct_many
from edm2.ema.storage.manifest import MANIFEST, read_manifest
from edm2.evaluation.copies import add_copies, held_out_images, training_images
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.generate import ImageGenerator
from edm2.generate.lengths import generators
from edm2.generate.own_guide import OwnGuide, own_guide
from edm2.progress import Progress, time_text
from edm2.report import Page, class_grid, image_grid, loss_curve, uncertainty_curve
from edm2.report.ema_figures import reconstruction_figure, tracked_figure
from edm2.report.magnitudes import add_magnitudes, magnitude_curve
from edm2.train.build import open_run_data
from edm2.train.consistency import Teacher
from edm2.train.logs import (
    MAGNITUDES_FILE,
    VALIDATION_FILE,
    is_magnitudes,
    is_progress,
    is_validation,
    read_log,
)
from edm2.train.run_folder import SNAPSHOTS, flat_settings, read_config
from edm2.train.settings_file import run_settings
from edm2.tuning.page import add_knobs, add_ranking, add_result
from edm2.tuning.result import read_tuned, tuned_settings

_NOISE_IMAGES = 256
_COPY_SAMPLES = 128
_MOMENTS, _SEEDS_SHOWN, _STEPS = 6, 10, 16
_TEACHER_STEPS, _STUDENT_STEPS = 32, (4, 2, 1)
_ROWS, _MOST_COLUMNS = 4, 16
_LENGTHS = (0.03, 0.05, 0.10, 0.20)


class _Run:
    """What a run's folder holds; snapshots that training adds later are not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name or str(folder.resolve())
        self.config = run_settings(folder)
        self.preset = read_config(folder)["settings"].get("preset")
        self.log = read_log(folder, is_wanted=is_progress)
        if not self.log:
            raise ValueError(f"{folder} has no line in its log yet: train on before asking for a report")
        self.magnitudes = read_log(folder, MAGNITUDES_FILE, is_wanted=is_magnitudes)
        self.validation = read_log(folder, VALIDATION_FILE, is_wanted=is_validation)
        self.snapshots = folder / SNAPSHOTS
        self.manifest = read_manifest(self.snapshots) if (self.snapshots / MANIFEST).exists() else None
        self.times = sorted({s.t for s in self.manifest.snapshots}) if self.manifest else []
        self.tuned = read_tuned(folder)

    @functools.cached_property
    def guide(self) -> OwnGuide:
        """What to sample with where nothing was tuned."""
        return own_guide(self.folder, self.times[-1])

    @property
    def is_student(self) -> bool:
        """Whether the run is one of `edm2 distill`."""
        return self.config.consistency is not None

    @property
    def sampling(self) -> dict[str, Any]:
        """A quick way to sample."""
        sampler = "consistency" if self.is_student else "dpmpp-2m"
        return {"num_steps": self.num_steps, "sampler": sampler}

    @property
    def num_steps(self) -> int:
        """Steps of the samples over time."""
        return _STUDENT_STEPS[1] if self.is_student else _STEPS

    @property
    def sigma_rel(self) -> float:
        """EMA length to show: the tuned one, or 0.1 or the tracked one next to it."""
        return self.tuned.best.sigma_rel if self.tuned and self.tuned.is_better else self.guide.sigma_rel

    def generator(self, t: float | None = None) -> ImageGenerator:
        """Return the model with the EMA length to show at a time; default: the last."""
        assert self.manifest is not None
        t = self.times[-1] if t is None else t
        try:
            return next(generators(self.snapshots, [self.sigma_rel], t))
        except ValueError:  # a long average of an early moment
            tracked = {s.sigma_rel for s in self.manifest.snapshots}
            return next(generators(self.snapshots, [min(tracked, key=lambda s: abs(s - self.sigma_rel))], t))

    def moments(self) -> list[float]:
        """Return up to six times of snapshots, each about twice the one before."""
        wanted = [self.times[-1] / 2**k for k in reversed(range(_MOMENTS))]
        logs = np.log(self.times)
        return sorted({self.times[int(np.abs(logs - math.log(w)).argmin())] for w in wanted})


def write_run_report(
    runs: Sequence[str | Path], out: str | Path, *, samples: bool = True, quiet: bool = False
) -> Path:
    """Write one self-contained page about training runs.

    Args:
        runs: Folders of one or more runs, finished or under way; several are shown side by side.
        out: The HTML file.
        samples: Whether to run the networks: samples over time, and errors by noise level.
        quiet: Whether to show no progress.

    Returns:
        The file.

    Raises:
        ValueError: If a folder is not a run or has logged nothing yet; nothing is written then.
    """
    opened = [_Run(Path(run)) for run in runs]
    if len({run.name for run in opened}) < len(opened):
        for run in opened:
            run.name = str(run.folder)
    page = Page(
        f"Training of {', '.join(run.name for run in opened)}",
        lead="What happened in training, drawn from the files of the run.",
    )
    parts: dict[str, Callable[[Page, _Run], None]] = {"Training": _training, "EMA profiles": _averages}
    if samples:
        parts = {"Samples": _best, "Samples over time": _samples, **parts}
        parts |= {"Error by noise level": _noise, "Copies": _copies}
        if any(run.is_student for run in opened):
            parts["Teacher and student"] = _side_by_side
    if any(run.tuned for run in opened):
        parts["Tuning"] = _tuning
    with Progress("report", len(parts) * len(opened), "parts", quiet=quiet) as progress:
        _overview(page, opened)
        for heading, draw in parts.items():
            page.section(heading)
            for run in opened:
                if len(opened) > 1:
                    page.text(run.name)
                if draw in _OF_SNAPSHOTS and not run.times:
                    page.text("No snapshot yet.")
                else:
                    draw(page, run)
                progress.advance(1)
            if draw is _training:
                _held_out(page, opened)
                _magnitudes(page, opened)
    _settings(page, opened)
    return page.write(out)


def _overview(page: Page, runs: Sequence[_Run]) -> None:
    rows = []
    for run in runs:
        last = run.log[-1]
        rows.append(
            {
                "run": run.name,
                "images": f"{last['num_images']:,} of {run.config.num_images:,}",
                "last loss": "-" if last["loss"] is None else f"{last['loss']:.4f}",
                "images/s": f"{last['images_per_second']:,.1f}",
                "last session": time_text(last["seconds"]),
                "steps not finite": sum(record["nonfinite_steps"] for record in run.log),
            }
        )
        told = {"residuals of": run.config.residual, "starts from": run.config.init}
        told |= {} if run.config.objective == "denoise" else {"objective": run.config.objective}
        if run.validation:
            told["held-out loss"] = f"{run.validation[-1]['loss_ema']:.4f}"
        rows[-1] |= {name: text for name, text in told.items() if text is not None}
    if len(rows) == 1:
        return page.facts({name: value for name, value in rows[0].items() if name != "run"})
    names = list(dict.fromkeys(name for row in rows for name in row))
    page.table(names, [[row.get(name, "") for name in names] for row in rows])


def _training(page: Page, run: _Run) -> None:
    seen = [record for record in run.log if record["loss"] is not None]
    if not seen:
        return page.text("No finite loss was logged.")
    images, loss = [r["num_images"] for r in seen], [r["loss"] for r in seen]
    rates = [r["learning_rate"] for r in seen]
    with page.columns():
        page.figure(
            loss_curve(images, loss, learning_rate=rates),
            "Training loss and learning rate" + _below_zero(run),
            "Curves of the training loss and the learning rate against images",
        )
        page.figure(
            magnitude_curve(images, [{"gradient": r["grad_norm"]} for r in seen], label="gradient norm"),
            "L2 norm of the whole gradient, on a logarithmic scale",
            "Curve of the gradient norm against images",
        )


def _below_zero(run: _Run) -> str:
    # Ref: EDM2 Eq. 21; config A has its first term only.
    if run.config.config == "A":
        return ""
    return "; the loss includes the learned uncertainty u(σ), so that it may fall below 0"


def _held_out(page: Page, runs: Sequence[_Run]) -> None:
    measured = [run for run in runs if run.validation]
    if not measured:
        return
    page.section("Held-out images")
    for run in measured:
        images, last = [r["num_images"] for r in run.validation], run.validation[-1]
        lowest = min(run.validation, key=lambda r: r["loss_ema"])
        average = f"EMA {last['sigma_rel']:g}"
        losses = [{"raw weights": r["loss"], average: r["loss_ema"]} for r in run.validation]
        page.figure(
            magnitude_curve(images, losses, label="held-out loss"),
            f"{run.name}: weighted squared error on held-out images, the same noise each time; lowest with {average} "
            f"after {lowest['num_images']:,} training images",
            "Curves of the loss on held-out images against training images",
        )
        rows = zip(last["levels"], last["by_level"], last["by_level_ema"], strict=True)
        page.table(
            ["noise level", "raw weights", average],
            [[f"{level:.3g}", f"{raw:.4f}", f"{ema:.4f}"] for level, raw, ema in rows],
            caption=f"Loss on held-out images after {last['num_images']:,} training images",
        )


def _magnitudes(page: Page, runs: Sequence[_Run]) -> None:
    page.section("Magnitudes")
    for run in runs:
        if not run.magnitudes:
            of = f"Of {run.name} they were" if len(runs) > 1 else "They were"
            page.text(f"{of} not recorded: train with --record-magnitudes.")
    add_magnitudes(page, [(run.name, run.magnitudes) for run in runs if run.magnitudes])


def _averages(page: Page, run: _Run) -> None:
    assert run.manifest is not None
    results, refused = [], []
    for length in _LENGTHS:
        try:
            results += reconstruct_many(
                run.snapshots, [length], run.times[-1], warn_above=math.inf, read=False
            )
        except ValueError as error:
            refused.append([f"{length:g}", str(error)])
    with page.columns():
        page.figure(
            tracked_figure(run.manifest, run.moments()),
            "Weight that the tracked averages give to each moment, at some of the stored times",
            "Curves of the power-function profiles of the tracked averages against training time",
        )
        if results:
            page.figure(
                reconstruction_figure(run.manifest, results),
                "Averages reconstructed from all snapshots, and the power functions that were wanted",
                "Curves of wanted and made profiles against training time, and their difference",
            )
    rows = [[f"{r.sigma_rel:g}", f"{r.expected_error:.1e}"] for r in results] + refused
    page.table(["EMA length", "expected error"], rows, caption="Relative error of the reconstructed weights")


def _tuning(page: Page, run: _Run) -> None:
    if run.tuned is None:
        return page.text("Not tuned.")
    add_result(page, run.tuned)
    add_knobs(page, run.tuned)
    add_ranking(page, run.tuned)


def _noise(page: Page, run: _Run) -> None:
    if run.is_student:
        return page.text("Not drawn: a student does not estimate the mean of the images behind the noise.")
    generator, loss = run.generator(), run.config.loss
    try:
        dataset = open_run_data(run.folder)
    except (ValueError, OSError) as error:
        return page.text(f"The training data can no longer be opened: {error}")
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), _NOISE_IMAGES)).astype(np.int64)
    labels = dataset.labels(chosen) if dataset.num_classes else None
    if generator.residual or run.config.objective == "mean":
        return page.text(
            "Not drawn for regressions and what they leave: train with --validation for their loss at each noise level."
        )
    sigma, learned, errors = errors_by_noise(
        generator, dataset.images(chosen), labels, **dataset.given(chosen)
    )
    if not np.isfinite(errors).all():
        return page.text("The network's outputs are not finite.")
    density = noise_density(sigma, p_mean=loss.p_mean, p_std=loss.p_std)
    has_uncertainty = generator.denoiser.uncertainty is not None
    page.figure(
        uncertainty_curve(sigma, learned if has_uncertainty else None, errors, density),
        f"Weighted squared error (natural logarithm) at each noise level, on {len(chosen)} training images"
        + (", beside the uncertainty that the network learned" if has_uncertainty else ""),
        "Curve of the log of the weighted error against noise level",
    )


def _best(page: Page, run: _Run) -> None:
    settings, _ = tuned_settings(run.folder)
    options = run.sampling
    guide: ImageGenerator | None = None
    try:
        if run.is_student:
            model, told = run.generator(), f"EMA {run.sigma_rel:g}, in {run.num_steps} steps"
        elif settings:
            model, guide = _tuned_models(run, settings)
            told = "the tuned settings"
            options |= {
                k: settings[k] for k in ("num_steps", "sampler", "guidance", "interval") if k in settings
            }
        else:
            model, guide = run.guide.load()
            told = f"{run.guide.words()}, not tuned yet"
            options["guidance"] = run.guide.guidance
        classes = model.num_classes
        seeds = range(_ROWS * classes if 2 <= classes <= _MOST_COLUMNS else _ROWS * _SEEDS_SHOWN)
        images = model.images(seeds, guide=guide, **options)
    except (ValueError, FloatingPointError) as error:
        return page.text(f"Not drawn: {error}")
    if images.dtype != np.uint8:
        return page.text("Not drawn: the model does not make pixels.")
    with page.columns():
        page.image(
            class_grid(images, classes, model.class_names),
            f"Generated from seeds 0 to {len(seeds) - 1}, with {told}",
            "Grid of generated images",
        )
        try:
            dataset = open_run_data(run.folder)
        except (ValueError, OSError) as error:
            return page.text(f"The training data can no longer be opened: {error}")
        rows = _like(dataset, [int(c) for c in model.labels_for(seeds)])
        page.image(
            class_grid(dataset.images(rows), classes, model.class_names),
            "Training images",
            "Grid of images that the network was trained on",
        )


def _tuned_models(run: _Run, settings: dict[str, Any]) -> tuple[ImageGenerator, ImageGenerator | None]:
    model = ImageGenerator.load(run.folder, settings["ema"], num_images=run.times[-1])
    if "guidance" not in settings:
        return model, None
    source, length = settings.get("guide", run.folder), settings.get("guide_ema")
    return model, ImageGenerator.load(source, length, num_images=settings.get("guide_images"))


def _like(dataset: ImageDataset, classes: list[int]) -> np.ndarray:
    """Training images of the same classes, spread over the data set; without classes, spread over all of it."""
    everything = np.arange(len(dataset))
    if not dataset.num_classes:
        return everything[np.linspace(0, len(dataset) - 1, len(classes)).astype(np.int64)]
    labels = dataset.labels(everything)
    members = {c: np.flatnonzero(labels == c) for c in set(classes)}
    shown = Counter[int]()
    rows = []
    for c in classes:
        own = members[c] if len(members[c]) else everything
        rows.append(own[shown[c] * len(own) // max(1, classes.count(c)) % len(own)])
        shown[c] += 1
    return np.array(rows)


def _samples(page: Page, run: _Run) -> None:
    rows, moments, classes = [], run.moments(), ""
    for t in moments:
        generator = run.generator(t)
        classes = _classes(generator)
        try:
            rows.append(generator.images(range(_SEEDS_SHOWN), **run.sampling))
        except (ValueError, FloatingPointError) as error:
            return page.text(f"Not drawn: {error}")
    images = np.concatenate(rows)
    if images.dtype != np.uint8:
        return page.text("Not drawn: the model does not make pixels.")
    scale = max(1, -(-64 // images.shape[-1]))
    times = ", ".join(f"{t:,.0f}" for t in moments)
    page.image(
        image_grid(images, columns=_SEEDS_SHOWN, scale=scale),
        f"Seeds 0 to {_SEEDS_SHOWN - 1}, one column each, after {times} images (top to bottom); "
        f"EMA length {run.sigma_rel:g}, {run.num_steps} steps{classes}",
        "Grid of samples from the same seeds at several moments of the training",
    )


def _copies(page: Page, run: _Run) -> None:
    try:
        training = training_images(run.folder)
        samples = run.generator().images(range(_COPY_SAMPLES), **run.sampling)
    except (ValueError, OSError, FloatingPointError) as error:
        return page.text(f"Not looked for: {error}")
    add_copies(page, samples, training, held_out_images(run.folder))


def _side_by_side(page: Page, run: _Run) -> None:
    options, seeds = run.config.consistency, range(_SEEDS_SHOWN)
    if options is None:
        return page.text("Not a student.")
    tuned = run.tuned.best if run.tuned is not None and run.tuned.is_better else None
    length = run.sigma_rel if tuned is None else tuned.sigma_rel
    try:
        teacher = Teacher.load(run.folder)
        guidance: dict[str, Any] = {}
        if teacher.guide is not None:
            guidance = {"guidance": options.guidance, "interval": options.interval}
            guidance["guide"] = teacher.guide_for_sampling
        model = ImageGenerator(teacher.model, teacher.coding, teacher.info)
        rows = [model.images(seeds, num_steps=_TEACHER_STEPS, sampler="heun", **guidance)]
        student = next(generators(run.snapshots, [length], run.times[-1]))
        for steps in _STUDENT_STEPS:
            levels = None if tuned is None or len(tuned.levels or ()) != steps - 1 else tuned.levels
            rows.append(student.images(seeds, num_steps=steps, levels=levels))
    except (ValueError, FloatingPointError) as error:
        return page.text(f"Not drawn: {error}")
    images = np.concatenate(rows)
    if images.dtype != np.uint8:
        return page.text("Not drawn: the model does not make pixels.")
    evaluations = ", ".join(map(str, _STUDENT_STEPS))
    page.image(
        image_grid(images, columns=_SEEDS_SHOWN, scale=max(1, 48 // images.shape[-1])),
        f"Seeds 0 to {_SEEDS_SHOWN - 1}, one column each, from the same noise. Top row: the teacher, Heun with "
        f"{2 * _TEACHER_STEPS - 1} evaluations{', guided' if guidance else ''}. Below: the student with {evaluations} "
        f"evaluations, EMA length {length:g}{_classes(student)}",
        "Grid of samples of teacher and student from the same seeds",
    )


def _classes(generator: ImageGenerator) -> str:
    if not generator.num_classes:
        return ""
    names = generator.class_names or [str(label) for label in range(generator.num_classes)]
    return f"; classes {', '.join(names[label] for label in generator.labels_for(range(_SEEDS_SHOWN)))}"


_OF_SNAPSHOTS = (_averages, _noise, _best, _samples, _copies, _side_by_side)


def _settings(page: Page, runs: Sequence[_Run]) -> None:
    page.section("Settings")
    flat = [{"preset": run.preset, **flat_settings(run.config.to_json())} for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(json.dumps(settings.get(name)) for settings in flat)] for name in names]
    page.table(["setting", *(run.name for run in runs)], rows)
