"""`edm2 suggest`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.advice import check_pictures, mending_words, suggest
from edm2.commands.next_step import run_for, tell_next
from edm2.data import open_dataset
from edm2.files import write_atomic
from edm2.progress import show
from edm2.train.config_groups import DataConfig


@dataclass(kw_only=True)
class _Suggest:
    """Suggest settings for training on your images in the time you have, each with its reason.

    Measures the spectrum of the data, and the speed of a few steps on this machine.
    """

    data: Annotated[str, tyro.conf.Positional]
    """Training images, as for `edm2 train --data`."""
    condition: str | None = None
    """Conditions that are stored separately, as for `edm2 train --condition`."""
    hours: float | None = None
    """Hours to train. Default: 0.25 on a CPU, 2 on a GPU."""
    memory: float | None = None
    """Memory for training, in GB. Default: the free memory of a GPU; no limit on a CPU."""
    out: Path | None = None
    """File to write for `edm2 train --settings`: .toml (with the reasons; Python 3.11 or newer) or .json.
    Default: none."""
    labels: bool = True
    """Whether to condition on the data's classes, if it has any."""
    as_they_are: bool = False
    """Whether to accept images with transparency, and learn it as a fourth channel."""
    skip_damaged: bool = False
    """Whether to skip damaged images."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 suggest`."""
    chosen = tyro.cli(_Suggest, prog=prog, args=list(words))
    if chosen.memory is not None and not chosen.memory > 0:
        raise ValueError(f"--memory {chosen.memory:g} must be above 0, in GB")
    if chosen.out is not None:
        if chosen.out.suffix not in (".toml", ".json"):
            raise ValueError(f"--out {chosen.out} must end in .toml or .json")
        if chosen.out.suffix == ".toml" and sys.version_info < (3, 11):
            raise ValueError(f"--out {chosen.out}: TOML needs Python 3.11 or newer: choose .json")
        if chosen.out.exists():
            raise ValueError(f"{chosen.out} exists already: choose another --out, or delete it")
    if not chosen.as_they_are:
        for source in filter(None, (chosen.data, chosen.condition)):
            check_pictures(source, labels=chosen.labels, device=chosen.device)
    advice = suggest(
        open_dataset(
            chosen.data,
            labels=chosen.labels,
            condition=chosen.condition,
            skip_damaged=chosen.skip_damaged,
        ),
        data=chosen.data,
        condition=chosen.condition,
        hours=chosen.hours,
        memory=None if chosen.memory is None else chosen.memory * 1e9,
        device=chosen.device,
        options=DataConfig(labels=chosen.labels, skip_damaged=chosen.skip_damaged),
    )
    show(advice.headline())
    show(advice.describe())
    if chosen.out is not None:
        is_toml = chosen.out.suffix == ".toml"
        text = advice.to_toml() if is_toml else json.dumps(advice.config.to_json(), indent=1)
        write_atomic(chosen.out, text.encode())
    if advice.is_too_large:
        size = advice.dataset.image_shape[1:]
        return tell_next(mending_words(chosen.data, {size: 1}, clear=False, device=chosen.device))
    folder = run_for(chosen.data)
    if chosen.out is not None:
        return tell_next("train", "--settings", chosen.out, "--out", folder)
    given: list[str | Path] = [] if chosen.condition is None else ["--condition", Path(chosen.condition)]
    hours = [] if chosen.hours is None else ["--hours", f"{chosen.hours:g}"]
    tell_next("train", "--data", Path(chosen.data), *given, "--out", folder, *hours)
