"""`edm2 tune`."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from edm2.commands.next_step import tell_next
from edm2.diffusion import MODEL_FILE
from edm2.evaluation.extractors import open_extractor
from edm2.evaluation.judge import Judge, Metric
from edm2.progress import show, tell
from edm2.train.build import open_run_data, pick_device
from edm2.tuning import BASELINE_SIGMA_REL, Tried, TuningPlan, check_guide, save_tuned, tune
from edm2.tuning.bench import moments
from edm2.tuning.page import score_text, verdict, write_tuning_report


@dataclass(kw_only=True)
class _Tune:
    """Find the EMA length, guide, guidance weight and interval with the lowest distance to the run's training images.

    The guide is an earlier moment of the same run, or what --guide names. Evaluations are kept: the same command
    continues after a stop. `edm2 sample RUN` uses what was found if it is better beyond its confidence interval. For a
    student of `edm2 distill` it finds the EMA length and the noise levels of --num-steps steps.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    metric: Metric = "frechet"
    """frechet: Frechet distance. kernel: kernel distance (KID), right on average for any number of images."""
    features: Literal["classifier", "inception", "dinov2"] = "classifier"
    """Feature extractor. classifier: trained on the run's images, which need classes, or read from --weights."""
    weights: str | None = None
    """Weights of the extractor: a file or http(s) address (inception, classifier), a folder or hub name (dinov2)."""
    weights_sha256: str | None = None
    """Expected hash of the weights. Required for inception, whose TorchScript file holds code that will run."""
    trust_weights: bool = False
    """Open a TorchScript file without knowing its hash."""
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
        check_guide(chosen.run, plan.guide)
    if not (chosen.run / MODEL_FILE).exists():
        tell(
            f"edm2: the run has not ended: its snapshot after {moment:,.0f} training images is tuned; to continue this "
            f"search after a stop, add --num-images {moment:.0f}"
        )
    judge = _judge(chosen, device)
    show(f"{judge.metric} in features of {judge.features}, lower is better")
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
    tell_next("sample", chosen.run, "--out", chosen.run / "samples")


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
    elif chosen.weights_sha256 is not None or chosen.trust_weights:
        raise ValueError("--weights-sha256 and --trust-weights are about --weights: give them too")
    return Judge(open_run_data(chosen.run), metric=chosen.metric, extractor=extractor)


def _mean(values: Sequence[float]) -> str:
    return f"{score_text(statistics.fmean(values))} ({score_text(min(values))} to {score_text(max(values))})"
