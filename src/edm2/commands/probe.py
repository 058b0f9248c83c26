"""`edm2 probe`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from edm2.data import ImageDataset, open_dataset
from edm2.evaluation.probe import NOISE_LEVELS, Probe, run_probe
from edm2.files import read_json, write_json
from edm2.generate import ImageGenerator
from edm2.generate.lengths import load_raw
from edm2.progress import show, tell
from edm2.train.run_folder import read_config

_TEST_SHARE = 0.25


@dataclass(kw_only=True)
class _Probe:
    """Classify images from the network's features with a linear classifier, at every block and several noise levels.

    Block and noise level are chosen on a part of the training images; the final accuracy is that on test images. A run
    that was trained without labels can be probed, if its data has classes.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    ema: float | None = None
    """EMA length to reconstruct from the run's snapshots. Default: the model that the run saved."""
    raw: bool = False
    """Probe the weights of the newest checkpoint, without any averaging."""
    data: str | None = None
    """Data set with classes to probe instead of the run's own."""
    sigmas: tuple[float, ...] = NOISE_LEVELS
    """Noise levels, in network units."""
    cells: int = 2
    """Number of parts of each side of the image over which a block's output is averaged; 1 averages over all pixels."""
    samples: int = 10_000
    """Maximum number of training images, and of test images, to use."""
    seed: int = 0
    """Seed of the noise and of the choice of images."""
    out: Path | None = None
    """JSON file for the numbers; an existing one is replaced. Default: probe.json in the run's folder."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 probe`."""
    chosen = tyro.cli(_Probe, prog=prog, args=list(words))
    if chosen.raw and chosen.ema is not None:
        raise ValueError(
            f"--raw and --ema {chosen.ema:g} exclude each other, because raw weights are not averaged"
        )
    out = chosen.out or chosen.run / "probe.json"
    _check_out(out)
    train, test, how = _split(chosen)
    generator = load_raw(chosen.run) if chosen.raw else ImageGenerator.load(chosen.run, chosen.ema)
    tell(f"edm2: {len(train[0]):,} training and {len(test[0]):,} test images ({how})")
    found = run_probe(generator, train, test, sigmas=chosen.sigmas, cells=chosen.cells, seed=chosen.seed)
    weights = "raw" if chosen.raw else generator.info.get("sigma_rel")
    write_json(out, {**found.to_json(), "weights": weights, "split": how, "cells": chosen.cells})
    best = f"{found.block}, sigma {found.sigma:g}"
    show(f"{_grid(found)}\n\naccuracy on test images: {100 * found.accuracy:.2f}% ({best})")
    show(f"written to {out}")


def _check_out(out: Path) -> None:
    try:
        known = not out.exists() or "validation" in read_json(out)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{out} exists and is not a result of `edm2 probe`: choose another --out")


Labelled = tuple[np.ndarray, np.ndarray]


def _split(chosen: _Probe) -> tuple[Labelled, Labelled, str]:
    """Training images, test images, and how they were parted."""
    settings = read_config(chosen.run)["settings"]
    source = chosen.data or settings["data"]
    form = {"pad_to": settings["dataset"]["pad_to"], "crop": settings["dataset"].get("crop")}
    train = open_dataset(source, **form)
    if not train.num_classes:
        raise ValueError(f"{source} has no classes to read: give data with labels as --data")
    rng = np.random.default_rng(chosen.seed)
    try:
        test = open_dataset(source, split="test", **form)
    except ValueError:
        order = rng.permutation(len(train))
        cut = round(_TEST_SHARE * len(train))
        how = "a random quarter, which the network has seen without labels, is the test"
        return _take(train, order[cut:][: chosen.samples]), _take(train, order[:cut][: chosen.samples]), how
    parts = (_take(some, rng.permutation(len(some))[: chosen.samples]) for some in (train, test))
    return next(parts), next(parts), "the data's own test split"


def _take(dataset: ImageDataset, rows: np.ndarray) -> Labelled:
    rows = np.sort(rows)
    return dataset.images(rows), dataset.labels(rows)


def _grid(found: Probe) -> str:
    """Accuracies as a table, blocks down and noise levels across, the best marked."""
    width = max(map(len, found.blocks))
    lines = ["accuracy in % on held-back training images, by block and noise level"]
    lines.append(" " * width + "".join(f"{sigma:>8g} " for sigma in found.sigmas))
    for block, row in zip(found.blocks, found.validation, strict=True):
        marks = ["*" if (block, sigma) == (found.block, found.sigma) else " " for sigma in found.sigmas]
        lines.append(
            f"{block:<{width}}" + "".join(f"{100 * v:>8.1f}{m}" for v, m in zip(row, marks, strict=True))
        )
    return "\n".join(lines)
