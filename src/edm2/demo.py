"""The whole job in minutes: train on digits, choose the EMA length, sample, measure, report."""

import dataclasses
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edm2.data import ImageDataset, open_dataset
from edm2.diffusion import read_model_header
from edm2.evaluation.copies import add_copies
from edm2.evaluation.judge import Judge
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.files import write_atomic, write_json
from edm2.generate import ImageGenerator, read_images, reconstruct_models, write_samples
from edm2.generate.lengths import generators
from edm2.generate.reconstructed import ema_file_name
from edm2.metrics import check_copies, label_agreement
from edm2.presets import get_preset
from edm2.progress import Progress, show, time_text
from edm2.report import Page, figure_png, image_grid, loss_curve, save_png, score_curve, uncertainty_curve
from edm2.train import TrainConfig, train
from edm2.train.logs import read_log
from edm2.train.run_folder import SNAPSHOTS, flat_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEEP = (0.05, 0.07, 0.09, 0.11, 0.13, 0.16, 0.20, 0.25)
_SWEEP_SEED, _SWEEP_IMAGES, _SWEEP_STEPS = 1_000_000, 300, 16
_SWEEP_SAMPLER = "dpmpp-2m"  # as good as Heun with twice the evaluations, for choosing
_FINAL_IMAGES, _FINAL_STEPS, _FINAL_SAMPLER = 1000, 16, "heun"
_PRESET = "digits"
_SHOWN = 10  # of each class


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the demo measured. Distances between images are of pixels scaled to [0, 1].

    Attributes:
        sigma_rels: Relative EMA lengths that were tried.
        scores: Frechet distance at each.
        best: Length chosen.
        frechet: Frechet distance of the final images to the training images.
        frechet_real: The same for real test images.
        agreement: Share of the final images whose class, by an independent classifier, is the intended one.
        accuracy_real: Accuracy of that classifier on real test images.
        nearest: Median distance of the final images to the nearest training image.
        nearest_real: The same for real test images.
        copies: Share of the final images nearer to a training image than 99% of the test images are.
        authentic: Share of the final images further from their nearest training image than that is from its own.
        seconds: Time of this session.
        continued: Whether an earlier session did a part, so that `seconds` is not the whole job.
    """

    sigma_rels: tuple[float, ...]
    scores: tuple[float, ...]
    best: float
    frechet: float
    frechet_real: float
    agreement: float
    accuracy_real: float
    nearest: float
    nearest_real: float
    copies: float
    authentic: float
    seconds: float
    continued: bool


def run_demo(
    out: str | Path,
    *,
    config: TrainConfig | None = None,
    num_images: int = _FINAL_IMAGES,
    quiet: bool = False,
) -> Measured:
    """Run the whole job and write `report.html`, PNGs, the run and the chosen model into `out`.

    Args:
        out: Folder; a demo that was interrupted there continues.
        config: Settings of the run, on a data set with classes and a test split; default: the preset `digits`.
        num_images: Images to sample and measure at the end, at least 2.
        quiet: Whether to show no progress.

    Returns:
        What was measured.

    Raises:
        ValueError: If the folder holds something else, the data has no classes, or as in `edm2.train.train`.
        Stopped: As in `edm2.train.train`; the same call continues.
    """
    out, start = Path(out), time.monotonic()
    _check_folder(out)
    continued = (out / "run").is_dir()
    if num_images < 2:
        raise ValueError(f"num_images {num_images} must be at least 2, for a comparison with real images")
    config = get_preset(_PRESET) if config is None else config
    real, test = (
        open_dataset(config.data, split=split, labels=config.dataset.labels, pad_to=config.dataset.pad_to)
        for split in ("train", "test")
    )
    if not real.num_classes:
        raise ValueError(f"{config.data} has no classes, by which the demo judges images: give labels")
    images, labels = _everything(real)
    test_images, test_labels = _everything(test)

    say = _Steps(5, quiet)
    say(f"Training on {config.num_images:,} images, tracking EMA lengths {_lengths(config.ema.sigma_rels)}")
    train(config, out / "run", preset=_PRESET if config == get_preset(_PRESET) else "", quiet=quiet)
    say(f"Fitting the feature classifier on {len(real)} real images")
    judge = Judge(real)
    say(f"Scoring {len(SWEEP)} EMA lengths reconstructed from that one run")
    scores = _sweep(out / "run" / SNAPSHOTS, judge, quiet)
    best = SWEEP[int(np.argmin(scores))]
    say(f"Sampling with the best EMA length, {best:g}")
    generator = ImageGenerator.load(_model(out, best))
    seeds = list(range(num_images))
    write_samples(
        generator, out / "samples", seeds, num_steps=_FINAL_STEPS, sampler=_FINAL_SAMPLER, quiet=quiet
    )
    made = read_images([out / "samples" / f"{seed:06d}.png" for seed in seeds])
    wanted = generator.labels_for(seeds)
    say("Measuring and writing the report")
    check = check_copies(made, images, test_images)
    measured = Measured(
        sigma_rels=SWEEP,
        scores=tuple(scores),
        best=best,
        frechet=judge.distance(made),
        frechet_real=judge.distance(test_images),
        agreement=label_agreement(images, labels, made, wanted),
        accuracy_real=label_agreement(images, labels, test_images, test_labels),
        nearest=check.median,
        nearest_real=check.median_held_out,
        copies=check.suspects,
        authentic=check.authentic,
        seconds=time.monotonic() - start,
        continued=continued,
    )
    write_json(out / "measured.json", dataclasses.asdict(measured))
    _write_report(out, config, measured, generator, made, images, test_images, test_labels)
    return measured


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder as --out")
    if out.exists() and any(out.iterdir()) and not (out / "run").is_dir():
        raise ValueError(f"{out} is not empty and holds no demo: choose another --out")


def _model(out: Path, sigma_rel: float) -> Path:
    """Return the file of the model with an EMA length; reconstruct it unless an earlier session did."""
    path = out / "ema" / ema_file_name(sigma_rel)
    if not path.exists():
        return reconstruct_models(out / "run", [sigma_rel], out / "ema")[0][0]
    seen = read_log(out / "run")[-1]["num_images"]
    was = read_model_header(path)[1]["info"].get("num_images")
    if was != seen:
        raise ValueError(
            f"{path} was made when the run had seen {was} images, and now it has seen {seen}: move {out / 'ema'} "
            f"and {out / 'samples'} away, or choose another --out"
        )
    return path


class _Steps:
    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.quiet, self.done = total, quiet, 0

    def __call__(self, text: str) -> None:
        self.done += 1
        if not self.quiet:
            show(f"[{self.done}/{self.total}] {text}")


def _everything(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    where = np.arange(len(dataset))
    return dataset.images(where), dataset.labels(where)


def _sweep(snapshots: Path, judge: Judge, quiet: bool) -> list[float]:
    seeds = range(_SWEEP_SEED, _SWEEP_SEED + _SWEEP_IMAGES)
    scores = []
    with Progress("scoring", len(SWEEP), "EMA lengths", quiet=quiet) as progress:
        for sigma_rel, generator in zip(SWEEP, generators(snapshots, SWEEP), strict=True):
            images = generator.images(seeds, num_steps=_SWEEP_STEPS, sampler=_SWEEP_SAMPLER)
            scores.append(judge.distance(images))
            progress.advance(EMA_length=sigma_rel, Frechet_distance=scores[-1])
    return scores


def _write_report(
    out: Path,
    config: TrainConfig,
    measured: Measured,
    generator: ImageGenerator,
    made: np.ndarray,
    images: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> None:
    classes = generator.num_classes
    shown = min(_SHOWN, int(np.bincount(test_labels, minlength=classes).min()))
    real = np.stack([test_images[test_labels == c][:shown] for c in range(classes)], axis=1)
    real_grid = image_grid(real.reshape(-1, *real.shape[2:]), columns=classes, scale=5)
    made_grid = image_grid(made[: _SHOWN * classes], columns=classes, scale=5)
    save_png(made_grid, out / "samples.png")
    save_png(real_grid, out / "real.png")

    log = read_log(out / "run")
    page = Page(
        "Digits, from nothing to a tuned generator",
        lead=f"A config-{config.config} diffusion model trained on {log[-1]['num_images']:,} images, its EMA "
        "length chosen after training.",
    )
    page.facts(
        {
            "intended class recognised": f"{100 * measured.agreement:.1f}%",
            "the same for real test digits": f"{100 * measured.accuracy_real:.1f}%",
            "Frechet distance": f"{measured.frechet:.2f}",
            "of real test digits": f"{measured.frechet_real:.2f}",
            "best EMA length": f"{100 * measured.best:.3g}%",
            "last session" if measured.continued else "whole job": time_text(measured.seconds),
        }
    )
    page.section("Samples", "One column per class. No sample was picked: these are the first seeds.")
    with page.columns():
        page.image(made_grid, "Generated", "Grid of generated digits, one column per class")
        page.image(real_grid, "Real, from the held-out test set", "Grid of real digits, one column per class")
    page.section("Are they copies?")
    add_copies(page, made, images, test_images)
    sigma, learned, errors = errors_by_noise(generator, test_images, test_labels)
    density = noise_density(sigma, p_mean=config.loss.p_mean, p_std=config.loss.p_std)
    uncertainty = uncertainty_curve(sigma, learned, measured=errors, density=density)
    _add_curves(page, out, config, measured, uncertainty)
    _add_settings(page, out, config, generator, num_images=len(made))
    page.write(out / "report.html")


def _add_curves(
    page: Page, out: Path, config: TrainConfig, measured: Measured, uncertainty: "Figure"
) -> None:
    seen = [record for record in read_log(out / "run") if record["loss"] is not None]
    tracked = config.ema.sigma_rels
    ema = score_curve(
        SWEEP, measured.scores, best=measured.best, tracked=tracked, reference=measured.frechet_real
    )
    loss = loss_curve([r["num_images"] for r in seen], [r["loss"] for r in seen])
    for name, figure in (("ema", ema), ("loss", loss), ("uncertainty", uncertainty)):
        write_atomic(out / f"{name}.png", figure_png(figure))
    page.section(
        "EMA length, chosen after training",
        f"Tracked: {_lengths(tracked)}; the other lengths were reconstructed from snapshots. Each was scored with "
        f"{_SWEEP_IMAGES} images in {_SWEEP_STEPS} steps of DPM-Solver++, in the features of a classifier trained on "
        f"the real training images; the final score above takes {_FINAL_STEPS} steps and other seeds.",
    )
    page.figure(ema, "Frechet distance against EMA length", "Curve of Frechet distance by EMA length")
    page.section("Training")
    with page.columns():
        page.figure(loss, "Training loss", "Curve of the training loss against images")
        page.figure(
            uncertainty,
            "Learned uncertainty and the error measured on test digits",
            "Curve of learned uncertainty against noise level",
        )


def _add_settings(
    page: Page, out: Path, config: TrainConfig, generator: ImageGenerator, *, num_images: int
) -> None:
    best = generator.info["sigma_rel"]
    # Folders of their own: nothing is ever overwritten.
    run, ema, samples = (shlex.quote(f"{out}-by-hand/{name}") for name in ("run", "ema", "samples"))
    commands = [
        f"edm2 train --preset {_PRESET} --out {run}",
        f"edm2 ema reconstruct {run} --sigma-rel {best:g} --out {ema}",
        f"edm2 sample --model {ema}/{ema_file_name(best)} --sampler {_FINAL_SAMPLER} "
        f"--num-steps {_FINAL_STEPS} "
        f"--seeds 0-{num_images - 1} --out {samples}",
    ]
    by_command = config == get_preset(_PRESET)
    page.section(
        "The same on the command line",
        "" if by_command else "After training with the settings below, from Python.",
    )
    page.code("\n".join(commands if by_command else commands[1:]))
    page.section(
        "Settings",
        f"{sum(p.numel() for p in generator.denoiser.parameters()):,} parameters. Expected error of the reconstructed "
        f"parameters: {generator.info['expected_error']:.1e} (relative L2).",
    )
    rows = [[name, json.dumps(value)] for name, value in flat_settings(config.to_json()).items()]
    page.table(["setting", "value"], rows)


def _lengths(sigma_rels: tuple[float, ...]) -> str:
    return " and ".join(f"{value:g}" for value in sigma_rels)
