"""The page about a search for the best settings of a run."""

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edm2.report import Page
from edm2.report.tuning_figures import knob_figure, lengths_figure
from edm2.tuning.lengths import Lengths
from edm2.tuning.plan import TuningPlan
from edm2.tuning.result import BASELINE_SIGMA_REL, Knobs, Tried, Tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 12
_UNTUNED = f"EMA {BASELINE_SIGMA_REL:g}, no guidance"
_KNOBS: dict[str, tuple[str, Callable[[Tried], float]]] = {
    "EMA length": ("EMA length", lambda t: t.knobs.sigma_rel),
    "guide": ("EMA length of the guide", lambda t: t.knobs.guide_sigma_rel or 0.0),
    "guidance weight": ("guidance weight", lambda t: t.knobs.guidance),
    "EMA length with guide": ("EMA length", lambda t: t.knobs.sigma_rel),
    "interval, upper end": ("upper end of the interval, sigma", lambda t: t.knobs.interval[1]),
    "interval, lower end": ("lower end of the interval, sigma", lambda t: t.knobs.interval[0]),
    "noise levels": ("first noise level after the start", lambda t: (t.knobs.levels or (0.0,))[0]),
    "EMA length once more": ("EMA length", lambda t: t.knobs.sigma_rel),
    "steps": ("noise levels of the sampler", lambda t: t.knobs.num_steps or 0),
    "churn": ("strength of added noise", lambda t: t.knobs.s_churn),
}


def write_tuning_report(tuned: Tuned, plan: TuningPlan, out: str | Path, *, title: str) -> Path:
    """Write the page: result with held-out seeds, a curve for each knob, a ranked table.

    Args:
        tuned: What the search found.
        plan: How far it went.
        out: The HTML file; an older one is replaced.
        title: Title of the page.

    Returns:
        The file.
    """
    page = Page(title, lead="One setting after the other, each starting from the best so far.")
    facts = {
        f"{tuned.metric}, tuned": f"{statistics.fmean(tuned.held_out):.3g}",
        _UNTUNED: f"{statistics.fmean(tuned.baseline):.3g}",
        "change" if tuned.is_better else "change, not significant": _change(tuned, tuned.improvement),
    }
    if tuned.num_images is not None:
        facts["tuned after, in training images"] = f"{tuned.num_images:,.0f}"
    page.facts(facts)
    page.section(
        "Result",
        f"Measured with {plan.repeats} sets of {plan.final_samples:,} images each. Their seeds are new to the search, "
        "and the same for both settings.",
    )
    add_result(page, tuned)
    points = f"Each point: {plan.samples:,} images, {plan.num_steps} steps of {plan.sampler}, the same seeds for all."
    scatter = None
    if plan.samples == plan.final_samples:
        scatter = statistics.stdev(tuned.held_out)
        points += (
            f" With other seeds the best settings scatter by {scatter:.3g} (standard deviation, the bars)."
        )
    page.section("Knob by knob", points)
    add_knobs(page, tuned, scatter)
    page.section("Ranking", f"The best of {len(tuned.tried)} settings tried.")
    add_ranking(page, tuned)
    return page.write(out)


def add_result(page: Page, tuned: Tuned) -> None:
    """Add the best settings, and their scores with held-out seeds next to those without tuning."""
    page.text(f"Best settings: {tuned.best.describe()}. {_capital(tuned.judged)}: {verdict(tuned)}.")
    repeats = zip(tuned.held_out, tuned.baseline, tuned.improvements, strict=True)
    rows: list[list[object]] = [
        [i, score_text(ours), score_text(theirs), _change(tuned, lower)]
        for i, (ours, theirs, lower) in enumerate(repeats, 1)
    ]
    page.table(["repeat", "tuned", _UNTUNED, "change"], rows)


def add_knobs(page: Page, tuned: Tuned, scatter: float | None = None) -> None:
    """Add a curve for each knob that was searched, with bars for the scatter of a score if it is known."""
    with page.columns():
        for stage, figure in knob_curves(tuned, scatter):
            knob = _KNOBS[stage][0]
            page.figure(figure, _capital(stage), f"Curve of {tuned.metric} against {knob}")


def knob_curves(tuned: Tuned, scatter: float | None = None) -> Iterator[tuple[str, "Figure"]]:
    """The stages of the search in their order, each with its curve of the score against the knob."""
    best = math.inf
    for stage, (knob, value) in _KNOBS.items():
        points = [t for t in tuned.tried if t.stage == stage]
        if not points:
            continue
        curves: dict[str, list[tuple[float, float]]] = {}
        for t in points:
            name = _guide_name(t.knobs) if stage == "guide" else ""
            curves.setdefault(name, []).append((value(t), t.score))
        before = best if math.isfinite(best) else None
        yield stage, knob_figure(curves, knob=knob, label=tuned.metric, reference=before, scatter=scatter)
        best = min(best, *(t.score for t in points))


def add_ranking(page: Page, tuned: Tuned) -> None:
    """Add a table of the best settings tried."""
    ranked = sorted(tuned.tried, key=lambda t: t.score)[:_SHOWN]
    page.table(
        [tuned.metric, "settings", "found while searching"],
        [[score_text(t.score), t.knobs.describe(), t.stage] for t in ranked],
    )


def add_lengths(page: Page, found: Lengths) -> None:
    """Add the score against the EMA length at several moments, and by group of layers."""
    page.text(f"{_capital(found.judged)}; each point took {found.work}.")
    moments = [f"{t:,.0f} images" for t in found.moments]
    with page.columns():
        page.figure(
            lengths_figure(dict(zip(moments, found.by_moment, strict=True)), label=found.metric),
            "At several points of the training; rings mark the lowest values",
            f"Curves of {found.metric} against EMA length, one for each point of the training",
        )
        if found.groups:
            page.figure(
                lengths_figure(dict(zip(found.groups, found.by_group, strict=True)), label=found.metric),
                f"At the last moment, with EMA length {found.best:g} everywhere but in one group of layers, whose "
                "length is varied",
                f"Curves of {found.metric} against the EMA length of one group of layers",
            )


def verdict(tuned: Tuned) -> str:
    """Say whether tuning helped: the improvement with its confidence and its repeats, or that nothing was found.

    Amounts are in percent of the score without tuning where that is clearly positive, else in units of the score.
    """
    error = tuned.improvement_error
    if error is None:
        return (
            f"change of {_change(tuned, tuned.improvement)} in one repeat, which has no confidence interval"
        )
    write = _amount if tuned.is_better else _change
    ends = (tuned.improvement - error, tuned.improvement + error)
    mean, low, high, *each = (
        write(tuned, value).removesuffix("%")
        for value in (tuned.improvement, *(ends if tuned.is_better else ends[::-1]), *tuned.improvements)
    )
    unit = "%" if tuned.is_share else ""
    numbers = f"{mean}{unit} (95% confidence {low} to {high}{unit}; repeats {' '.join(each)})"
    if tuned.is_better:
        return f"lower by {numbers}"
    return f"nothing better than {_UNTUNED} was found; change of {numbers}"


def score_text(score: float) -> str:
    """Write a score with enough digits, also for kernel distances, which may be thousandths."""
    return f"{score:.4f}" if abs(score) >= 0.1 else f"{score:.3g}"


def _amount(tuned: Tuned, improvement: float) -> str:
    return f"{100 * improvement:.1f}%" if tuned.is_share else score_text(improvement)


def _change(tuned: Tuned, improvement: float) -> str:
    text = _amount(tuned, 0.0 - improvement)
    return text if text.startswith("-") else f"+{text}"


def _guide_name(knobs: Knobs) -> str:
    if knobs.guide is None:
        return f"guide of {knobs.guide_images:,.0f} images"
    return "given model file, drawn at 0" if knobs.guide_sigma_rel is None else "given run"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
