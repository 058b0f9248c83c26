"""A bounded search, one knob after the other, each from the best settings so far."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from edm2.diffusion import consistency_steps
from edm2.tuning.bench import Bench, CaseScore, Score
from edm2.tuning.plan import HELD_OUT_SEED, SEARCH_SEED, SELF, TuningPlan, has_snapshots
from edm2.tuning.result import BASELINE_SIGMA_REL, Knobs, Tried, Tuned

_FOR_GUIDE_SEARCH = 1.5  # weight with which guides are compared, before the weight itself is searched


def tune(
    run: str | Path,
    score: Score | CaseScore,
    plan: TuningPlan,
    *,
    device: torch.device | str = "cpu",
    on_tried: Callable[[Tried, Tried], None] | None = None,
) -> Tuned:
    """Search one setting after the other; earlier evaluations are reused.

    The order is: EMA length; the guide (the plan's, or an earlier moment of the run) and its EMA length; guidance
    weight; the EMA length once more, with the guide; upper end of the interval; lower end of the interval; number of
    steps; strength of added noise. For a student it is: EMA length; noise levels, first
    all, then each; EMA length once more.

    A guide that makes scores worse at the weight of its search is tried at lower weights; if none helps, the rest of
    the search is skipped. Settings that give the same images as others are skipped, such as an interval that holds the
    same noise levels. A warning names settings that are skipped because the snapshots cannot give an average, such as
    a long one early in the run, or because the images are not finite.

    The point of the run is fixed at the start: snapshots that training adds during the search are not read.

    Args:
        run: Folder of a training run, finished or under way.
        score: What to minimise.
        plan: How far to search.
        device: Where to make images.
        on_tried: Called after each evaluation with it and the best so far.

    Returns:
        The best settings and everything that was tried. Evaluations are kept in the run's folder `tuning`, so that an
        interrupted search continues.

    Raises:
        ValueError: If the run has no snapshots, they give none of the lengths or not that of the comparison, or the
            guide does not fit.
        FloatingPointError: If the images of the comparison are not finite.
    """
    bench = Bench(Path(run), score, plan, device)
    compared = Knobs(sigma_rel=BASELINE_SIGMA_REL)
    if refusal := bench.refusal(compared):
        raise ValueError(f"there is nothing to compare tuned settings with: {refusal}")
    tried = _search(bench, plan, on_tried)
    if not tried:
        raise ValueError(f"the snapshots of {run} give none of the EMA lengths {plan.sigma_rels}")
    starts = [HELD_OUT_SEED + i * plan.final_samples for i in range(plan.repeats)]
    held_out, baseline = (
        [bench.evaluate(knobs, range(start, start + plan.final_samples)) for start in starts]
        for knobs in (_best(tried).knobs, compared)
    )
    return Tuned(
        best=_best(tried).knobs,
        num_images=bench.moments[-1],
        num_steps=plan.num_steps,
        sampler=plan.sampler,
        range=plan.range,
        tried=tried,
        held_out=held_out,
        baseline=baseline,
        metric=score.metric,
        features=score.features,
    )


def _search(bench: Bench, plan: TuningPlan, on_tried: Callable[[Tried, Tried], None] | None) -> list[Tried]:
    seeds = range(SEARCH_SEED, SEARCH_SEED + plan.samples)
    tried: list[Tried] = []
    effects = set()
    stages = _STUDENT_STAGES if plan.is_for_student else _STAGES
    for stage, propose in stages.items():
        for knobs in propose(tried, plan, bench):
            effect = bench.effect(knobs)
            if effect in effects:
                continue
            effects.add(effect)
            refusal = bench.refusal(knobs)
            try:
                score = None if refusal else bench.evaluate(knobs, seeds)
            except FloatingPointError as error:
                score, refusal = None, str(error)
            if score is None:
                warnings.warn(f"skipped {knobs.describe()}: {refusal}", stacklevel=3)
                continue
            tried.append(Tried(stage=stage, knobs=knobs, score=score))
            if on_tried is not None:
                on_tried(tried[-1], _best(tried))
        if not tried:
            break
    return tried


def _best(tried: Sequence[Tried]) -> Tried:
    return min(tried, key=lambda t: t.score)


def _lengths(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start = _best(tried).knobs if tried else Knobs(sigma_rel=plan.sigma_rels[0])
    return (dataclasses.replace(start, sigma_rel=s) for s in plan.sigma_rels)


def _guides(tried: Sequence[Tried], plan: TuningPlan, bench: Bench) -> Iterable[Knobs]:
    start = dataclasses.replace(_best(tried).knobs, guidance=_FOR_GUIDE_SEARCH)
    shortest, longest = plan.sigma_rels[0], plan.sigma_rels[-1]
    lengths = [min(max(start.sigma_rel * factor, shortest), longest) for factor in plan.guide_factors]
    sources: list[tuple[str | None, float | None, list[float] | list[None]]] = []
    if plan.guide is not None:
        own = lengths if plan.guide == SELF or has_snapshots(plan.guide) else [None]
        sources.append((str(plan.guide), bench.guide_moment, own))
    wanted = [fraction * bench.moments[-1] for fraction in plan.guide_moments]
    for images in sorted({min(bench.moments, key=lambda m: abs(m - w)) for w in wanted}):
        sources.append((None, images, lengths))
    for guide, moment, some in sources:
        for length in some:
            yield dataclasses.replace(start, guide=guide, guide_images=moment, guide_sigma_rel=length)


def _weights(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    guided = [t for t in tried if t.knobs.is_guided]
    if not guided:
        return []
    helps = _best(tried) in guided
    weights = [weight for weight in plan.guidances if helps or weight < _FOR_GUIDE_SEARCH]
    return [dataclasses.replace(_best(guided).knobs, guidance=weight) for weight in weights]


def _highs(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start = _best(tried).knobs
    return [dataclasses.replace(start, interval=(0.0, high)) for high in plan.highs]


def _lows(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start = _best(tried).knobs
    high = start.interval[1]
    return [dataclasses.replace(start, interval=(low, high)) for low in plan.lows if low < high]


def _levels(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start, levels = _best(tried).knobs, _default_levels(plan)
    for factor in plan.level_factors if levels else ():
        yield dataclasses.replace(start, levels=tuple(factor * level for level in levels))


def _default_levels(plan: TuningPlan) -> tuple[float, ...]:
    return tuple(consistency_steps(plan.num_steps, sigma_max=plan.sigma_max)[1:-1].tolist())


def _each_level(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    """From the lowest level to the highest, each from the best so far."""
    for i in reversed(range(plan.num_steps - 1 if plan.num_steps > 2 else 0)):
        start = _best(tried).knobs
        levels = start.levels or _default_levels(plan)
        for factor in plan.level_factors:
            moved = (*levels[:i], factor * levels[i], *levels[i + 1 :])
            if list(moved) == sorted(moved, reverse=True):
                yield dataclasses.replace(start, levels=moved)


def _steps(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start = _best(tried).knobs
    return [dataclasses.replace(start, num_steps=None if n == plan.num_steps else n) for n in plan.steps]


def _churns(tried: Sequence[Tried], plan: TuningPlan, _: Bench) -> Iterable[Knobs]:
    start = _best(tried).knobs
    return [dataclasses.replace(start, s_churn=churn) for churn in plan.churns]


# Name of each stage, and what it proposes after what was tried.
_STAGES: dict[str, Callable[[Sequence[Tried], TuningPlan, Bench], Iterable[Knobs]]] = {
    "EMA length": _lengths,
    "guide": _guides,
    "guidance weight": _weights,
    "EMA length with guide": _lengths,
    "interval, upper end": _highs,
    "interval, lower end": _lows,
    "steps": _steps,
    "churn": _churns,
}
_STUDENT_STAGES: dict[str, Callable[[Sequence[Tried], TuningPlan, Bench], Iterable[Knobs]]] = {
    "EMA length": _lengths,
    "noise levels": _levels,
    "each noise level": _each_level,
    "EMA length once more": _lengths,
}
