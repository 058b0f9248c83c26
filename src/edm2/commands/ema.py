"""`edm2 ema`: averages of the weights, after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.generate import reconstruct_models


@dataclass(kw_only=True)
class _Reconstruct:
    """Write models with any EMA length from the snapshots of one run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or of its snapshots."""
    sigma_rel: str
    """EMA lengths relative to the training time, separated by commas: 0.05,0.10."""
    out: Path
    """Folder for the models, named after their lengths."""
    images: float | None = None
    """Time in images at which the averages are wanted; default: the last snapshot's."""


def reconstruct(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema reconstruct`."""
    chosen = tyro.cli(_Reconstruct, prog=prog, args=list(words))
    for path, error in reconstruct_models(
        chosen.run, _lengths(chosen.sigma_rel), chosen.out, t=chosen.images
    ):
        print(f"{path}  expected relative error {error:.1e}")


def _lengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sigma-rel {text!r}: write lengths separated by commas, 0.05,0.10") from None
