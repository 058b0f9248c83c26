"""`edm2 report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.commands.next_step import after_looking
from edm2.progress import show, tell, time_text
from edm2.run_page import write_run_report
from edm2.train.build import pick_device
from edm2.tuning.lengths import LengthStudy, length_score


@dataclass(kw_only=True)
class _Report:
    """Write a page about one run, or about several side by side: one HTML file that opens offline.

    With --lengths the page shows how the score depends on the EMA length. That takes minutes, and continues after a
    stop; later pages show it without the option.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, finished or under way."""
    out: Path | None = None
    """File for the page; an existing report is replaced. Default: report.html in the first run's folder."""
    samples: bool = True
    """Run the networks: samples over time and errors by noise level."""
    lengths: bool = False
    """Measure first how the score depends on the EMA length, at four moments and for groups of layers: the Frechet
    distance as in `edm2 tune`, or the loss where images have no classes."""
    length_images: int = 500
    """Images for each score of --lengths."""
    device: str = "auto"
    """Where --lengths runs: auto, cpu, cuda, or cuda:N."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 report`."""
    chosen = tyro.cli(_Report, prog=prog, args=list(words))
    if not chosen.runs:
        raise ValueError("no run was given: name the folder of at least one")
    if chosen.length_images < 2:
        raise ValueError(f"--length-images {chosen.length_images} must be at least 2")
    if chosen.lengths:
        for folder in chosen.runs:
            _measure(folder, chosen)
    out = chosen.out or chosen.runs[0] / "report.html"
    show(write_run_report(chosen.runs, out, samples=chosen.samples))
    after_looking(chosen.runs[0])


def _measure(run: Path, chosen: _Report) -> None:
    score = length_score(run, chosen.length_images)
    study = LengthStudy(run, score, device=pick_device(chosen.device))
    about = time_text(study.seconds())
    tell(
        f"edm2: {run}: {study.num_models} averages, for each {score.work}: about {about} if none is done yet"
    )
    study.measure()
