"""`edm2 tune`."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from edm2.commands.next_step import tell_to_sample
from edm2.diffusion import MODEL_FILE
from edm2.evaluation.extractors import open_extractor
from edm2.evaluation.judge import Judge, Metric
from edm2.progress import show, tell
from edm2.train.build import open_alike, open_run_data, pick_device
from edm2.train.settings_file import run_settings
from edm2.tuning import BASELINE_SIGMA_REL, Tried, TuningPlan, open_guide, save_tuned, tune
from edm2.tuning.bench import moments
from edm2.tuning.held_out import EnsembleJudge, EnsembleMetric
from edm2.tuning.page import score_text, verdict, write_tuning_report
from edm2.tuning.result import judged

_STEPS = (8, 12, 16, 24)
_CHURNS = (5.0, 20.0)


@dataclass(kw_only=True)
class _Tune:
    """Find the EMA length, guide, guidance weight and interval with the lowest distance to the run's training images.

    For a run on pairs, --metric crps finds the settings whose ensembles score best on held-out cases, including the
    number of steps and the strength of added noise. For a student of `edm2 distill`, the command finds the EMA length
    and the noise levels of --num-steps steps.

    The guide is an earlier point of the same run, or the model of --guide. `edm2 sample RUN` uses the settings found if
    they are better at 95% confidence. Run the same command again to continue after an interruption.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    metric: Metric | EnsembleMetric = "frechet"
    """frechet: Frechet distance. kernel: kernel distance (KID), unbiased for any number of images. For models
    conditioned on images, with held-out cases: crps: fair CRPS of ensembles; spread-skill: how far the ratio of their
    spread to their error is from 1."""
    cases: str | None = None
    """Held-out pairs for crps and spread-skill, in any form that `edm2 train --data` takes. Default: the split "test"
    of the run's data."""
    condition: str | None = None
    """Conditions of these pairs, if they are stored separately, as for `edm2 train --condition`."""
    members: int = 16
    """Members for each case, for crps and spread-skill."""
    features: Literal["classifier", "inception", "dinov2"] = "classifier"
    """Feature extractor. classifier: trained on the run's images (which need classes), or read from --weights."""
    weights: str | None = None
    """Weights of the extractor: a file or http(s) address (inception, classifier), a folder or hub name (dinov2)."""
    weights_sha256: str | None = None
    """Expected sha256 of the weights. Required for inception, whose TorchScript file contains code that runs."""
    trust_weights: bool = False
    """Open a TorchScript file without checking its hash."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    plan: Annotated[TuningPlan, tyro.conf.arg(name="")] = field(default_factory=TuningPlan)


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 tune`."""
    chosen = tyro.cli(_Tune, prog=prog, args=list(words))
    # A student has defaults of its own.
    default = dataclasses.replace(chosen, plan=TuningPlan.for_run(chosen.run))
    chosen = tyro.cli(_Tune, prog=prog, args=list(words), default=default)
    device = pick_device(chosen.device)
    # What can be refused is refused before a classifier is trained.
    moment = moments(chosen.run, chosen.plan.num_images)[-1]
    plan = dataclasses.replace(chosen.plan, num_images=moment)
    if plan.guide is not None:
        open_guide(chosen.run, plan.guide)
    if not (chosen.run / MODEL_FILE).exists():
        tell(
            f"edm2: the run has not ended, so its snapshot after {moment:,.0f} training images is tuned; to continue "
            f"this search after an interruption, add --num-images {moment:.0f}"
        )
    judge: Judge | EnsembleJudge
    if chosen.metric in get_args(EnsembleMetric):
        plan = _with_ensemble_knobs(plan)
        judge = _ensemble_judge(chosen, plan)
    else:
        judge = _judge(chosen, device)
    show(f"{judged(judge.metric, judge.features)}, lower is better")
    done = 0

    def on_tried(tried: Tried, best: Tried) -> None:
        nonlocal done
        done += 1
        count = f"{done}/{plan.most_evaluations}"
        mark = "  <- best so far" if tried == best else ""
        show(f"{count:>6}  {tried.stage:<21} {score_text(tried.score):>9}  {tried.knobs.describe()}{mark}")

    found = tune(chosen.run, judge, plan, device=device, on_tried=on_tried)
    folder = save_tuned(chosen.run, found)
    report = write_tuning_report(found, plan, folder / "report.html", title=f"Tuning of {chosen.run.name}")
    show(f"best: {found.best.describe()}, tuned after {found.num_images:,.0f} training images")
    show(f"{found.metric} with held-out seeds {_mean(found.held_out)}")
    show(f"with EMA {BASELINE_SIGMA_REL:g} and no guidance  {_mean(found.baseline)}")
    show(verdict(found))
    show(f"report: {report}")
    if found.is_better:
        show(f"model:  {folder / MODEL_FILE}")
    tell_to_sample(chosen.run)


def _with_ensemble_knobs(plan: TuningPlan) -> TuningPlan:
    """The knobs that set an ensemble's spread, where the user chose no values for them."""
    steps = plan.steps or _STEPS
    churns = plan.churns or (_CHURNS if plan.sampler == "heun" else ())
    return dataclasses.replace(plan, steps=steps, churns=churns)


def _ensemble_judge(chosen: _Tune, plan: TuningPlan) -> EnsembleJudge:
    config = run_settings(chosen.run)
    split = "train" if chosen.cases else "test"
    dataset = open_alike(config, chosen.cases or config.data, split=split, condition=chosen.condition)
    metric: Any = chosen.metric
    return EnsembleJudge(dataset, plan, metric=metric, members=chosen.members)


def _judge(chosen: _Tune, device: torch.device) -> Judge:
    extractor = None
    if chosen.features != "classifier" or chosen.weights is not None:
        extractor = open_extractor(
            chosen.features,
            chosen.weights,
            sha256=chosen.weights_sha256,
            trust=chosen.trust_weights,
            device=device,
        )
    elif chosen.cases is not None or chosen.condition is not None:
        raise ValueError(
            f"--cases and --condition are for --metric crps and spread-skill, not {chosen.metric}: leave them out"
        )
    elif chosen.weights_sha256 is not None or chosen.trust_weights:
        raise ValueError("--weights-sha256 and --trust-weights are about --weights: give them too")
    metric: Any = chosen.metric
    return Judge(open_run_data(chosen.run), metric=metric, extractor=extractor)


def _mean(values: Sequence[float]) -> str:
    return f"{score_text(statistics.fmean(values))} ({score_text(min(values))} to {score_text(max(values))})"
