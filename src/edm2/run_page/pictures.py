"""Parts of a run's page for which its networks are run."""

from typing import Any

import numpy as np

from edm2.data.views import rows_like
from edm2.evaluation.copies import add_copies, held_out_images, training_images
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.generate import ImageGenerator
from edm2.generate.lengths import generators
from edm2.report import Page, class_grid, image_grid, uncertainty_curve
from edm2.run_page.run import STUDENT_STEPS, Run
from edm2.train.build import open_run_data
from edm2.train.consistency import Teacher
from edm2.tuning.result import tuned_settings

_NOISE_IMAGES = 256
_COPY_SAMPLES = 128
_SEEDS_SHOWN = 10
_TEACHER_STEPS = 32
_ROWS, _MOST_COLUMNS = 4, 16


def add_best(page: Page, run: Run) -> None:
    """Images with the settings that suit the run, beside training images of the same classes."""
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
        rows = rows_like(dataset, [int(c) for c in model.labels_for(seeds)])
        page.image(
            class_grid(dataset.images(rows), classes, model.class_names),
            "Training images",
            "Grid of images that the network was trained on",
        )


def _tuned_models(run: Run, settings: dict[str, Any]) -> tuple[ImageGenerator, ImageGenerator | None]:
    model = ImageGenerator.load(run.folder, settings["ema"], num_images=run.times[-1])
    if "guidance" not in settings:
        return model, None
    source, length = settings.get("guide", run.folder), settings.get("guide_ema")
    return model, ImageGenerator.load(source, length, num_images=settings.get("guide_images"))


def add_samples_over_time(page: Page, run: Run) -> None:
    """The same seeds at several moments of the training."""
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
        "Grid of samples from the same seeds at several points of the training",
    )


def add_noise_errors(page: Page, run: Run) -> None:
    """Error of the network at each noise level."""
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
            "Not drawn for regressions and residual models: train with --validation for their loss at each noise level."
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
        + (", and the uncertainty that the network learned" if has_uncertainty else ""),
        "Curve of the log of the weighted error against noise level",
    )


def add_copy_check(page: Page, run: Run) -> None:
    """Training images that samples come close to."""
    try:
        training = training_images(run.folder)
        samples = run.generator().images(range(_COPY_SAMPLES), **run.sampling)
    except (ValueError, OSError, FloatingPointError) as error:
        return page.text(f"Not looked for: {error}")
    add_copies(page, samples, training, held_out_images(run.folder))


def add_teacher_and_student(page: Page, run: Run) -> None:
    """A student beside its teacher, from the same noise."""
    options, seeds = run.config.consistency, range(_SEEDS_SHOWN)
    if options is None:
        return page.text("Not a student.")
    tuned = run.tuned.best if run.tuned is not None and run.tuned.is_better else None
    length = run.sigma_rel if tuned is None else tuned.sigma_rel
    try:
        teacher = Teacher.load(run.folder).with_fixed_weights()
        guidance: dict[str, Any] = {}
        if teacher.guide is not None:
            guidance = {"guidance": options.guidance, "interval": options.interval}
            guidance["guide"] = teacher.guide_for_sampling
        model = ImageGenerator(teacher.model, teacher.coding, teacher.info)
        rows = [model.images(seeds, num_steps=_TEACHER_STEPS, sampler="heun", **guidance)]
        student = next(generators(run.snapshots, [length], run.times[-1]))
        for steps in STUDENT_STEPS:
            levels = None if tuned is None or len(tuned.levels or ()) != steps - 1 else tuned.levels
            rows.append(student.images(seeds, num_steps=steps, levels=levels))
    except (ValueError, FloatingPointError) as error:
        return page.text(f"Not drawn: {error}")
    images = np.concatenate(rows)
    if images.dtype != np.uint8:
        return page.text("Not drawn: the model does not make pixels.")
    evaluations = ", ".join(map(str, STUDENT_STEPS))
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
