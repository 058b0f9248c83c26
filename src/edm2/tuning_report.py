"""The page about a search for the best settings of a run."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from edm2.report import Page
from edm2.report.tuning import knob_figure
from edm2.tuning import BASELINE_SIGMA_REL, Tried, Tuned, TuningPlan

_SHOWN = 12
_KNOBS: dict[str, tuple[str, Callable[[Tried], float]]] = {
    "EMA length": ("EMA length", lambda t: t.knobs.sigma_rel),
    "guide": ("the guide's EMA length", lambda t: t.knobs.guide_sigma_rel or 0.0),
    "guidance weight": ("guidance weight", lambda t: t.knobs.guidance),
    "EMA length with guide": ("EMA length", lambda t: t.knobs.sigma_rel),
    "interval, upper end": ("upper end of the interval, sigma", lambda t: t.knobs.interval[1]),
    "interval, lower end": ("lower end of the interval, sigma", lambda t: t.knobs.interval[0]),
}


def write_tuning_report(tuned: Tuned, plan: TuningPlan, out: str | Path, *, title: str) -> Path:
    """Write the page: result with held-out seeds, a curve for each knob, a ranked table.

    Args:
        tuned: what the search found.
        plan: how far it went.
        out: the HTML file; an older one is replaced.
        title: of the page.

    Returns:
        The file.
    """
    page = Page(title, lead="One knob after the other, each from the best settings so far.")
    page.facts(
        {
            "Frechet distance, tuned": f"{statistics.fmean(tuned.held_out):.3g}",
            f"EMA {BASELINE_SIGMA_REL:g}, no guidance": f"{statistics.fmean(tuned.baseline):.3g}",
            "lower by": f"{100 * tuned.improvement:.0f}%",
        }
    )
    page.section(
        "Result",
        f"Best settings: {tuned.best.describe()}. Measured with {plan.repeats} times {plan.final_samples:,} images of "
        "seeds that the search never saw.",
    )
    rows: list[list[object]] = [
        [name, f"{statistics.fmean(values):.4f}", f"{min(values):.4f}", f"{max(values):.4f}"]
        for name, values in (("tuned", tuned.held_out), ("untuned", tuned.baseline))
    ]
    page.table(["", "mean", "lowest", "highest"], rows)
    page.section("Knob by knob", f"Each point: {plan.samples:,} images, {plan.num_steps} steps.")
    best = math.inf
    with page.columns():
        for stage, (knob, value) in _KNOBS.items():
            points = [t for t in tuned.tried if t.stage == stage]
            if points:
                curves: dict[str, list[tuple[float, float]]] = {}
                for t in points:
                    name = f"guide of {t.knobs.guide_images:,.0f} images" if stage == "guide" else ""
                    curves.setdefault(name, []).append((value(t), t.score))
                before = best if math.isfinite(best) else None
                figure = knob_figure(curves, knob=knob, label="Frechet distance", reference=before)
                page.figure(figure, stage.capitalize(), f"Curve of Frechet distance against {knob}")
                best = min(best, *(t.score for t in points))
    page.section("Ranking", f"The best of {len(tuned.tried)} settings tried.")
    ranked = sorted(tuned.tried, key=lambda t: t.score)[:_SHOWN]
    page.table(
        ["score", "settings", "found while searching"],
        [[f"{t.score:.4f}", t.knobs.describe(), t.stage] for t in ranked],
    )
    return page.write(out)
