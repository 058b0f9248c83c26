"""`edm2 demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from edm2.commands.next_step import tell_next
from edm2.demo import run_demo
from edm2.forecast.demo import run_forecast_demo
from edm2.generate.reconstructed import ema_file_name
from edm2.progress import show


@dataclass(kw_only=True)
class _Demo:
    """Train on handwritten digits, tune the EMA length, sample, measure and write a report."""

    out: Path | None = None
    """Folder for everything. Default: runs/demo, or runs/demo-forecast with --forecast."""
    forecast: bool = False
    """Run the demo of forecasts: train on drifting fields, forecast an ensemble, and compare it with the exact law."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 demo`."""
    chosen = tyro.cli(_Demo, prog=prog, args=list(words))
    if chosen.forecast:
        return _forecast(chosen.out or Path("runs/demo-forecast"))
    out = chosen.out or Path("runs/demo")
    measured = run_demo(out)
    show(
        f"intended class recognised: {100 * measured.agreement:.1f}% "
        f"(real test digits: {100 * measured.accuracy_real:.1f}%)\n"
        f"Frechet distance: {measured.frechet:.3f} at EMA length {measured.best:g} "
        f"(real test digits: {measured.frechet_real:.3f})\n"
        f"report:  {out / 'report.html'}\n"
        f"samples: {out / 'samples.png'}\n"
        f"model:   {out / 'ema' / ema_file_name(measured.best)}"
    )


def _forecast(out: Path) -> None:
    measured = run_forecast_demo(out)
    show(
        f"CRPS above the exact law's: {100 * (max(measured.ratio) - 1):.1f}% at most\n"
        f"spread / skill: {min(measured.spread_skill):.3f} to {max(measured.spread_skill):.3f}\n"
        f"below persistence: {100 * min(measured.below_persistence):.0f}% or more\n"
        f"report: {out / 'report.html'}"
    )
    tell_next("train", "--data", Path("FOLDER"), "--out", Path("runs/FOLDER"))
