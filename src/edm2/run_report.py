"""`report.html` of one training run, or of several side by side."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2.diffusion import edm2_loss
from edm2.ema.snapshots import read_manifest
from edm2.generate import Generator
from edm2.judging import generators
from edm2.nn import keyed_normal
from edm2.progress import Progress, time_text
from edm2.report import Page, image_grid, loss_curve, uncertainty_curve
from edm2.report.magnitudes import by_resolution, magnitude_curve
from edm2.train.build import open_run_data
from edm2.train.run_folder import MAGNITUDES_FILE, SNAPSHOTS, flat_settings, read_config, read_log

_NOISE_LEVELS, _NOISE_IMAGES = 25, 256
_MOMENTS, _SEEDS_SHOWN, _STEPS = 6, 10, 16
_KINDS = {
    "activations": ("Activations", "RMS of block outputs"),
    "weights": ("Weights", "RMS of weights"),
    "gradients": ("Gradients", "RMS of gradients"),
    "updates": ("Updates", "relative change a step"),
}


class _Run:
    """What a run's folder holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name or str(folder.resolve())
        self.settings: dict[str, Any] = read_config(folder)["settings"]
        self.log = read_log(folder)
        if not self.log:
            raise ValueError(f"{folder} has no line in its log yet: train on before asking for a report")
        self.magnitudes = read_log(folder, MAGNITUDES_FILE)
        found = (folder / SNAPSHOTS / "manifest.json").exists()
        self.manifest = read_manifest(folder / SNAPSHOTS) if found else None

    def generator(self, t: float | None = None) -> Generator | None:
        """The longest tracked average at a time (default: the last), or None before the first snapshot."""
        if self.manifest is None or not self.manifest.snapshots:
            return None
        longest = max(s.sigma_rel for s in self.manifest.snapshots)
        return next(generators(self.folder / SNAPSHOTS, [longest], t))

    def moments(self) -> list[float]:
        """Up to six times of snapshots, each about twice the one before."""
        assert self.manifest is not None
        times = sorted({s.t for s in self.manifest.snapshots})
        wanted = [times[-1] / 2**k for k in reversed(range(_MOMENTS))]
        logs = np.log(times)
        return sorted({times[int(np.abs(logs - math.log(w)).argmin())] for w in wanted})


def write_run_report(
    runs: Sequence[str | Path], out: str | Path, *, samples: bool = True, quiet: bool = False
) -> Path:
    """Write one self-contained page about training runs.

    Args:
        runs: folders of runs, finished or under way; several are shown side by side.
        out: the HTML file.
        samples: whether to run the networks: samples over time, and errors by noise level.
        quiet: show no progress.

    Returns:
        The file.

    Raises:
        ValueError: if a folder is no run or has logged nothing yet; nothing is written then.
    """
    opened = [_Run(Path(run)) for run in runs]
    if not opened:
        raise ValueError("no run was given: name the folder of at least one")
    names = ", ".join(run.name for run in opened)
    page = Page(f"Training of {names}", lead="What happened in training, drawn from the files of the run.")
    with Progress("report", 4 * len(opened), "parts", quiet=quiet) as progress:
        _overview(page, opened)
        _each(page, opened, "Training", _training, progress)
        _each(page, opened, "Magnitudes", _magnitudes, progress)
        if samples:
            _each(page, opened, "Error by noise level", _noise, progress)
            _each(page, opened, "Samples over time", _samples, progress)
    _settings(page, opened)
    return page.write(out)


def errors_by_noise(
    generator: Generator, images: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the network learned of its own error, beside that error.

    Args:
        generator: a model with its coding.
        images: as stored in the data set, `[N, C, H, W]`.
        labels: `[N]` classes or `[N, D]` vectors; None for an unconditional model.

    Returns:
        Noise levels, the learned uncertainty u, and the log of the weighted error measured on the images.
    """
    sigmas = torch.logspace(math.log10(0.002), math.log10(80), _NOISE_LEVELS)
    index = torch.arange(len(images))
    classes = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels))
    measured = []
    with torch.no_grad():
        clean = generator.coding.encode(torch.from_numpy(images), index, seed=0)
        noise = keyed_normal(index, clean.shape[1:], seed=1)
        learned = generator.denoiser.logvar(sigmas).flatten()
        for sigma, u in zip(sigmas, learned, strict=True):
            loss = edm2_loss(generator.denoiser, clean, classes, sigma.expand(len(clean)), noise)
            # The loss is error / exp(u) + u; undo it.
            measured.append(float(torch.log((loss.mean() - u) * u.exp())))
    return sigmas.numpy(), learned.numpy(), np.array(measured)


def noise_density(sigmas: np.ndarray, *, p_mean: float, p_std: float) -> np.ndarray:
    """Density of the training noise over ln(sigma), up to a factor."""
    return np.exp(-0.5 * ((np.log(sigmas) - p_mean) / p_std) ** 2)


def _each(page: Page, runs: Sequence[_Run], heading: str, draw: Any, progress: Progress) -> None:
    page.section(heading)
    for run in runs:
        if len(runs) > 1:
            page.text(run.name)
        draw(page, run)
        progress.advance(1)


def _overview(page: Page, runs: Sequence[_Run]) -> None:
    rows = []
    for run in runs:
        last = run.log[-1]
        bad = sum(record["nonfinite_steps"] for record in run.log)
        rows.append(
            [
                run.name,
                f"{last['num_images']:,} of {run.settings['num_images']:,}",
                "-" if last["loss"] is None else f"{last['loss']:.4f}",
                f"{last['images_per_second']:,.1f}",
                time_text(last["seconds"]),
                bad,
            ]
        )
    page.table(["run", "images", "last loss", "images/s", "last session", "steps not finite"], rows)


def _training(page: Page, run: _Run) -> None:
    seen = [record for record in run.log if record["loss"] is not None]
    if not seen:
        return page.text("No finite loss was logged.")
    images, loss = [r["num_images"] for r in seen], [r["loss"] for r in seen]
    rates = [r["learning_rate"] for r in seen]
    with page.columns():
        page.figure(
            loss_curve(images, loss, learning_rate=rates),
            "Training loss and learning rate",
            "Curves of the training loss and the learning rate against images",
        )
        page.figure(
            magnitude_curve(images, [{"gradient": r["grad_norm"]} for r in seen], label="gradient norm"),
            "L2 norm of the whole gradient",
            "Curve of the gradient norm against images",
        )


def _magnitudes(page: Page, run: _Run) -> None:
    if not run.magnitudes:
        return page.text("Not recorded: train with --record-magnitudes.")
    add_magnitudes(page, run.magnitudes)


def add_magnitudes(
    page: Page, records: Sequence[dict[str, Any]], *, kinds: Sequence[str] = tuple(_KINDS)
) -> None:
    """Add curves of a run's magnitudes, by resolution.

    Args:
        page: where.
        records: lines of `magnitudes.jsonl`.
        kinds: activations, weights, gradients, updates.
    """
    images = [record["num_images"] for record in records]
    with page.columns():
        for kind in kinds:
            title, label = _KINDS[kind]
            values = [by_resolution(record[kind]) for record in records]
            page.figure(
                magnitude_curve(images, values, label=label), title, f"Curves of {label} by resolution"
            )


def _noise(page: Page, run: _Run) -> None:
    generator, settings = run.generator(), run.settings
    if generator is None:
        return page.text("No snapshot yet.")
    try:
        dataset = open_run_data(run.folder)
    except (ValueError, OSError) as error:
        return page.text(f"The training data cannot be opened any more: {error}")
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), _NOISE_IMAGES)).astype(np.int64)
    labels = dataset.labels(chosen) if dataset.num_classes else None
    sigma, learned, errors = errors_by_noise(generator, dataset.images(chosen), labels)
    density = noise_density(sigma, p_mean=settings["loss"]["p_mean"], p_std=settings["loss"]["p_std"])
    page.figure(
        uncertainty_curve(*(values.tolist() for values in (sigma, learned, errors, density))),
        f"Learned uncertainty beside the error on {len(chosen)} training images",
        "Curve of learned uncertainty against noise level",
    )


def _samples(page: Page, run: _Run) -> None:
    if run.manifest is None or not run.manifest.snapshots:
        return page.text("No snapshot yet.")
    rows, moments = [], run.moments()
    for t in moments:
        generator = run.generator(t)
        assert generator is not None
        rows.append(generator.images(range(_SEEDS_SHOWN), num_steps=_STEPS))
    images = np.concatenate(rows)
    if images.dtype != np.uint8:
        return page.text("The model makes no pixels, so there is nothing to look at.")
    scale = max(1, 48 // images.shape[-1])
    times = ", ".join(f"{t:,.0f}" for t in moments)
    page.image(
        image_grid(images, columns=_SEEDS_SHOWN, scale=scale),
        f"Seeds 0 to {_SEEDS_SHOWN - 1}, one column each, after {times} images (top to bottom); "
        f"EMA length {max(s.sigma_rel for s in run.manifest.snapshots):g}, {_STEPS} steps",
        "Grid of samples from the same seeds at several moments of the training",
    )


def _settings(page: Page, runs: Sequence[_Run]) -> None:
    page.section("Settings")
    flat = [flat_settings(run.settings) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(json.dumps(settings.get(name)) for settings in flat)] for name in names]
    page.table(["setting", *(run.name for run in runs)], rows)
