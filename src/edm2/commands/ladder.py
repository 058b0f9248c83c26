"""`edm2 ladder`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from edm2.ladder import LadderPlan, run_ladder, with_length, write_ladder_report
from edm2.ladder.page import table
from edm2.presets import get_preset
from edm2.progress import show


@dataclass(kw_only=True)
class _Ladder:
    """Train configurations A to G on the same images and compare them, each at its own best EMA length.

    Run the same command again to continue after an interruption.
    """

    out: Path
    """Folder for all runs, ladder.json and report.html."""
    preset: str = "digits"
    """Settings of config G. The other configurations' settings follow in the paper's proportions."""
    data: str | None = None
    """Images with classes. Default: the preset's."""
    images: int | None = None
    """Training images of each run; the learning-rate schedule scales with it. Default: the preset's."""
    batch: int | None = None
    """Images per step. Default: the preset's."""
    p_mean: float | None = None
    """Mean of ln sigma in training for configs B to G. A keeps the paper's -1.2. Default: the preset's."""
    p_std: float | None = None
    """Standard deviation of ln sigma for configs B to G. A keeps the paper's 1.2. Default: the preset's."""
    plan: Annotated[LadderPlan, tyro.conf.arg(name="")] = field(default_factory=LadderPlan)


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 ladder`."""
    chosen = tyro.cli(_Ladder, prog=prog, args=list(words))
    settings = with_length(get_preset(chosen.preset), chosen.images, chosen.batch)
    if chosen.data is not None:
        settings = dataclasses.replace(settings, data=chosen.data)
    noise = {name: getattr(chosen, name) for name in ("p_mean", "p_std")}
    given = {name: value for name, value in noise.items() if value is not None}
    settings = dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, **given))
    rungs = run_ladder(settings, chosen.plan, chosen.out)
    headers, rows = table(rungs)
    lines: list[list[object]] = [[*headers], ["---"] * len(headers), *rows]
    show("\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines))
    show(write_ladder_report(rungs, settings, chosen.plan, chosen.out))
