"""`edm2 tune`."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from edm2.judging import Judge
from edm2.train.build import open_run_data
from edm2.tuned import BASELINE_SIGMA_REL, Tried, save_tuned
from edm2.tuning import TuningPlan, tune
from edm2.tuning_report import improvement_text, write_tuning_report


@dataclass(kw_only=True)
class _Tune:
    """Find the EMA length, guide, guidance weight and interval with the lowest Frechet distance.

    The guide is an earlier moment of the same run. Features are those of a classifier trained on the run's own
    images, which need classes. Evaluations are kept: the same command continues after a stop, and `edm2 sample RUN`
    uses what was found.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    plan: Annotated[TuningPlan, tyro.conf.arg(name="")] = field(default_factory=TuningPlan)


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 tune`."""
    chosen = tyro.cli(_Tune, prog=prog, args=list(words))
    judge = Judge(open_run_data(chosen.run))
    done = 0

    def show(tried: Tried, best: Tried) -> None:
        nonlocal done
        done += 1
        count = f"{done}/{chosen.plan.most_evaluations}"
        mark = "  <- best so far" if tried == best else ""
        print(f"{count:>6}  {tried.stage:<21} {tried.score:9.4f}  {tried.knobs.describe()}{mark}", flush=True)

    found = tune(chosen.run, judge, chosen.plan, on_tried=show)
    folder = save_tuned(chosen.run, found)
    report = write_tuning_report(
        found, chosen.plan, folder / "report.html", title=f"Tuning of {chosen.run.name}"
    )
    print(f"best: {found.best.describe()}")
    print(f"Frechet distance with held-out seeds {_mean(found.held_out)}")
    print(f"with EMA {BASELINE_SIGMA_REL:g} and no guidance  {_mean(found.baseline)}")
    print(f"lower by {improvement_text(found)}")
    print(f"report: {report}\nmodel:  {folder / 'model.safetensors'}")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
