"""`edm2 sample`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from edm2.generate import Generator, parse_seeds, write_samples
from edm2.train.build import pick_device


@dataclass(kw_only=True)
class _Sample:
    """Make images with a model: one PNG a seed, and a grid. A folder that is half full is continued."""

    model: Path
    """Model file, or the folder of a finished run."""
    out: Path
    """Folder for the images."""
    seeds: str = "0-63"
    """One image a seed: 0-63 or 1,5,10-12. Noise and class come from the seed alone."""
    label: int | None = None
    """Class of all images; default: seed modulo the number of classes."""
    guide: Path | None = None
    """Model to guide with: an unconditional one, or a weaker one."""
    guidance: float = 1.0
    """Guidance weight; 1 for none."""
    num_steps: int = 32
    """Noise levels; the network runs twice on each but the last."""
    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float = 80.0
    """Highest noise level."""
    rho: float = 7.0
    """Exponent of the schedule."""
    s_churn: float = 0.0
    """Strength of added noise; 0 is deterministic."""
    batch: int = 250
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 sample`."""
    chosen = tyro.cli(_Sample, prog=prog, args=list(words))
    seeds = parse_seeds(chosen.seeds)
    device = pick_device(chosen.device)
    generator = Generator.load(chosen.model, device=device)
    options = {
        name: getattr(chosen, name)
        for name in ("num_steps", "sigma_min", "sigma_max", "rho", "s_churn", "guidance")
    }
    if chosen.guide is not None:
        options["guide"] = Generator.load(chosen.guide, device=device).denoiser
    labels = None if chosen.label is None else [chosen.label] * len(seeds)
    print(write_samples(generator, chosen.out, seeds, labels=labels, batch_size=chosen.batch, **options))
