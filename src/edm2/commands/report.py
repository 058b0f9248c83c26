"""`edm2 report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.commands.next_step import after_looking
from edm2.progress import show
from edm2.run_page import write_run_report


@dataclass(kw_only=True)
class _Report:
    """Draw what happened in one run, or in several side by side, as one HTML file that opens offline."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, finished or under way."""
    out: Path | None = None
    """The file; default: report.html in the first run's folder. An older report there is replaced."""
    samples: bool = True
    """Run the networks: samples over time and errors by noise level."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 report`."""
    chosen = tyro.cli(_Report, prog=prog, args=list(words))
    if not chosen.runs:
        raise ValueError("no run was given: name the folder of at least one")
    out = chosen.out or chosen.runs[0] / "report.html"
    show(write_run_report(chosen.runs, out, samples=chosen.samples))
    after_looking(chosen.runs[0])
