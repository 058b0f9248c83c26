"""The table and the page about the configurations, trained and scored in the same way.

Ref: EDM2 Table 1, Fig. 3.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edm2.ladder.experiment import Rung, growth, spread
from edm2.ladder.plan import LadderPlan
from edm2.nn import CONFIGS
from edm2.report import Page
from edm2.report.ladder_figures import growth_figure, ladder_figure, length_curves
from edm2.report.magnitudes import add_magnitudes
from edm2.train import TrainConfig
from edm2.train.logs import MAGNITUDES_FILE, read_log

PAPER_FID = {"A": 8.00, "B": 7.24, "C": 6.96, "D": 3.75, "E": 3.02, "F": 2.71, "G": 2.56}
"""ImageNet-512, size S, from the paper's Table 1."""


def write_ladder_report(
    rungs: Sequence[Rung], settings: TrainConfig, plan: LadderPlan, out: str | Path
) -> Path:
    """Write `report.html` next to the runs: table, distances, EMA lengths, magnitudes.

    Args:
        rungs: What `run_ladder` returned.
        settings: Settings of config G.
        plan: What was trained and how it was judged.
        out: The folder that `run_ladder` filled.

    Returns:
        The file.
    """
    out = Path(out)
    page = Page(
        "The ladder, configurations A to G",
        lead=f"Trained on {settings.data}, {settings.num_images:,} images each, {len(plan.seeds)} seeds; every run "
        "judged at its own best EMA length, found after training.",
    )
    page.section(
        "Result",
        f"Frechet distance to the training images in the features of a classifier trained on them, "
        f"{plan.final_samples} images, {plan.num_steps} {plan.sampler} steps; median of the seeds, and their range. "
        "The length was chosen with other images. A small data set and a short run need not follow the paper's order.",
    )
    page.table(*table(rungs))
    dropout = "each configuration's own" if plan.dropout is None else f"{plan.dropout:g} in all"
    page.text(
        f"Batches of {settings.batch_size} images; ln σ of B to G has mean {settings.loss.p_mean:g} and standard "
        f"deviation {settings.loss.p_std:g}; dropout: {dropout}."
    )
    page.text(
        f"Magnitudes are those of the last record over those of the first, which comes after {settings.log_images:,} "
        "images: what changed before that is not in them. Speeds are means over each run's last session."
    )
    page.text(" ".join(_at_the_edge(rungs, plan)))
    distances = {r.config: r.frechet for r in rungs}
    if np.isfinite(list(distances.values())).any():
        page.figure(
            ladder_figure(distances, PAPER_FID),
            "Frechet distance by configuration; below, the paper's at ImageNet-512",
            "Dots of the Frechet distance of each run by configuration, above the paper's values",
        )
    else:
        page.text("Every run diverged: try lower rate factors.")
    page.section(
        "EMA length", "First seed. All lengths were reconstructed after training, from one run each."
    )
    curves = {r.config: r.by_length[0] for r in rungs if np.isfinite(r.by_length[0]).all()}
    if curves:
        page.figure(
            length_curves(plan.sigma_rels, curves),
            "Frechet distance against EMA length",
            "Curves of Frechet distance against EMA length, one per configuration",
        )
    left_out = [r.config for r in rungs if r.config not in curves]
    if left_out:
        page.text(f"Left out, because a distance is not finite: {', '.join(left_out)}.")
    if len(plan.rate_factors) > 1:
        page.section(
            "Learning rate",
            "The paper's rates in proportion, times a factor found in the same way for every configuration: in runs of "
            f"{plan.rate_images:,} images, over which the rate takes the same course, the lowest Frechet distance over "
            "all EMA lengths wins.",
        )
        rows = [
            [r.config, *(f"{r.rate_scores[f]:.3g}" for f in plan.rate_factors), r.rate_factor] for r in rungs
        ]
        page.table(["config", *(f"x {f:g}" for f in plan.rate_factors), "used"], rows)
    page.section("Magnitudes", "First seed of each configuration.")
    logs = {r.config: read_log(out / r.config / f"seed-{plan.seeds[0]}", MAGNITUDES_FILE) for r in rungs}
    logs = {config: records for config, records in logs.items() if records}
    if logs:
        page.figure(
            growth_figure({c: ([r["num_images"] for r in log], *growth(log)) for c, log in logs.items()}),
            "Activations of the largest block, and RMS of all weights, over their first record",
            "Curves of the growth of activations and of weights in training, one per configuration",
        )
    named = [(f"{config}, {CONFIGS[config].title}", records) for config, records in logs.items()]
    add_magnitudes(page, named, kinds=("activations", "weights"))
    return page.write(out / "report.html")


def _at_the_edge(rungs: Sequence[Rung], plan: LadderPlan) -> list[str]:
    """Write a sentence for each choice at an end of the range tried, beyond which a better one may lie."""
    found = []
    for rung in rungs:
        factors, lengths = plan.rate_factors, plan.sigma_rels
        if len(factors) > 1 and rung.rate_factor in (min(factors), max(factors)):
            found.append(
                f"{rung.config}: the best rate factor, {rung.rate_factor:g}, is at an end of the range tried."
            )
        ends = sorted({s for s in rung.sigma_rel if s in (min(lengths), max(lengths))})
        if len(lengths) > 1 and ends:
            text = " and ".join(f"{s:g}" for s in ends)
            found.append(f"{rung.config}: a best EMA length, {text}, is at an end of the range tried.")
    return found


def table(rungs: Sequence[Rung]) -> tuple[list[str], list[list[object]]]:
    """Return headers and rows, one row per configuration."""
    headers = [
        "config", "name", "Frechet distance", "EMA length", "rate factor", "images/s",
        "activations, last/first record", "weights, last/first record", "parameters", "paper's FID",
    ]  # fmt: skip
    rows: list[list[object]] = [
        [
            rung.config, CONFIGS[rung.config].title, spread(rung.frechet), spread(rung.sigma_rel),
            f"{rung.rate_factor:g}", spread(rung.images_per_second), spread(rung.activations),
            spread(rung.weights), f"{rung.num_params:,}" if rung.num_params else "unknown",
            f"{PAPER_FID[rung.config]:.2f}",
        ]
        for rung in rungs
    ]  # fmt: skip
    return headers, rows
