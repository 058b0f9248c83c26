"""Parts of a run's page that are drawn from its files alone; no network is run."""

import json
import math
from collections.abc import Sequence

from edm2.ema import reconstruct_many
from edm2.progress import time_text
from edm2.report import Page, loss_curve
from edm2.report.ema_figures import reconstruction_figure, tracked_figure
from edm2.report.magnitudes import add_magnitudes, magnitude_curve
from edm2.run_page.run import Run
from edm2.train.run_folder import flat_settings
from edm2.tuning.page import add_knobs, add_lengths, add_ranking, add_result

_LENGTHS = (0.03, 0.05, 0.10, 0.20)


def add_overview(page: Page, runs: Sequence[Run]) -> None:
    """How far the runs are, and how fast they train."""
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


def add_training(page: Page, run: Run) -> None:
    """Loss, learning rate and gradient norm."""
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


def _below_zero(run: Run) -> str:
    # Ref: EDM2 Eq. 21; config A has its first term only.
    if run.config.config == "A":
        return ""
    return "; the loss includes the learned uncertainty u(σ), so that it may fall below 0"


def add_held_out(page: Page, runs: Sequence[Run]) -> None:
    """Loss on held-out images, if any run measured it."""
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


def add_run_magnitudes(page: Page, runs: Sequence[Run]) -> None:
    """Magnitudes of weights, activations and updates, and which runs did not record them."""
    page.section("Magnitudes")
    for run in runs:
        if not run.magnitudes:
            of = f"Of {run.name} they were" if len(runs) > 1 else "They were"
            page.text(f"{of} not recorded: train with --record-magnitudes.")
    add_magnitudes(page, [(run.name, run.magnitudes) for run in runs if run.magnitudes])


def add_averages(page: Page, run: Run) -> None:
    """Tracked averages, and how well others can be reconstructed from them."""
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
            "Weight that the tracked averages give to each point of the training, at some of the stored times",
            "Curves of the power-function profiles of the tracked averages against training time",
        )
        if results:
            page.figure(
                reconstruction_figure(run.manifest, results),
                "Averages reconstructed from all snapshots, and the wanted power functions",
                "Curves of wanted and reconstructed profiles against training time, and their difference",
            )
    rows = [[f"{r.sigma_rel:g}", f"{r.expected_error:.1e}"] for r in results] + refused
    page.table(["EMA length", "expected error"], rows, caption="Relative error of the reconstructed weights")


def add_length_curves(page: Page, run: Run) -> None:
    """How the score depends on the EMA length, where that was measured."""
    if run.lengths is None:
        return page.text("Not measured: `edm2 report --lengths` does it.")
    add_lengths(page, run.lengths)


def add_tuning(page: Page, run: Run) -> None:
    """What `edm2 tune` found."""
    if run.tuned is None:
        return page.text("Not tuned.")
    add_result(page, run.tuned)
    add_knobs(page, run.tuned)
    add_ranking(page, run.tuned)


def add_settings(page: Page, runs: Sequence[Run]) -> None:
    """All settings, a column for each run."""
    page.section("Settings")
    flat = [{"preset": run.preset, **flat_settings(run.config.to_json())} for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(json.dumps(settings.get(name)) for settings in flat)] for name in names]
    page.table(["setting", *(run.name for run in runs)], rows)
