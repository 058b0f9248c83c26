"""`edm2 export`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.hub import open_pretrained
from edm2.hub.export import TOLERANCE, Format, export_model
from edm2.progress import show


@dataclass(kw_only=True)
class _Export:
    """Write a model for programs that do not know edm2, and check that it makes the same images.

    Tuned runs and shared folders are exported with their guide and settings, unless an EMA length is given.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, model file, folder of `save_pretrained`, or NAME.json of `edm2 import`."""
    to: Format
    """pt2 for torch.export, onnx, or diffusers."""
    out: Path
    """Folder to write."""
    ema: float | None = None
    """EMA length to reconstruct from the run's snapshots. Default: the run's final model."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 export`."""
    chosen = tyro.cli(_Export, prog=prog, args=list(words))
    done = export_model(open_pretrained(chosen.model, chosen.ema), chosen.to, chosen.out)
    show(
        f"wrote {done.folder}; its images differ from edm2's by {done.difference:.1e} of their standard deviation "
        f"(bound: {TOLERANCE:g})"
    )
    if chosen.to != "diffusers":
        show(f"next: python {done.folder / 'sample.py'} --count 16 --out images.npy")
