"""`edm2 demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from edm2.commands.next_step import tell_next
from edm2.demo import run_demo
from edm2.generate.reconstructed import ema_file_name
from edm2.progress import show


@dataclass(kw_only=True)
class _Demo:
    """Train on handwritten digits, tune the EMA length, sample, measure and write a report."""

    out: Path = Path("runs/demo")
    """Folder for everything."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 demo`."""
    chosen = tyro.cli(_Demo, prog=prog, args=list(words))
    measured = run_demo(chosen.out)
    show(
        f"intended class recognised: {100 * measured.agreement:.1f}% "
        f"(real test digits: {100 * measured.accuracy_real:.1f}%)\n"
        f"Frechet distance: {measured.frechet:.3f} at EMA length {measured.best:g} "
        f"(real test digits: {measured.frechet_real:.3f})\n"
        f"report:  {chosen.out / 'report.html'}\n"
        f"samples: {chosen.out / 'samples.png'}\n"
        f"model:   {chosen.out / 'ema' / ema_file_name(measured.best)}"
    )
    tell_next("train", "--data", Path("FOLDER"), "--out", Path("runs/FOLDER"))
