"""Configurations A to G trained on the same images, each scored at its own best EMA length.

Ref: EDM2 Table 1, Fig. 3.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2.evaluation.judge import Judge
from edm2.files import read_sealed, write_sealed
from edm2.generate import ImageGenerator
from edm2.generate.lengths import generators
from edm2.ladder.plan import FINAL_SEED, RATE_RUN_SEED, SEARCH_SEED, LadderPlan, with_length
from edm2.progress import show
from edm2.train import TrainConfig, train
from edm2.train.build import open_training_data, pick_device
from edm2.train.logs import MAGNITUDES_FILE, read_log
from edm2.train.run_folder import SNAPSHOTS, difference, flat_settings
from edm2.train.with_config import with_config

_MOMENTS = 16  # at which a run writes snapshots
_FILE = "ladder.json"


@dataclass(kw_only=True)
class Rung:
    """What came out for one configuration.

    Attributes:
        config: Its letter.
        rate_scores: Frechet distance by factor on the learning rate; empty without a search.
        rate_factor: Factor used.
        frechet: Distance of each seed, at the best EMA length of that run.
        sigma_rel: That length, of each seed.
        by_length: Frechet distance in the search by EMA length, of each seed.
        images_per_second: Training speed of each seed.
        activations: RMS of the outputs of the largest block, in the last record over the first, of each seed. The first
            record comes after the first `log_images` of training; NaN if it is the only one.
        weights: RMS of the weights, likewise.
        num_params: Number of parameters; 0 if every run diverged.
    """

    config: str
    rate_scores: dict[float, float] = field(default_factory=dict)
    rate_factor: float = 1.0
    frechet: list[float] = field(default_factory=list)
    sigma_rel: list[float] = field(default_factory=list)
    by_length: list[list[float]] = field(default_factory=list)
    images_per_second: list[float] = field(default_factory=list)
    activations: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    num_params: int = 0


def run_ladder(
    settings: TrainConfig, plan: LadderPlan, out: str | Path, *, quiet: bool = False
) -> list[Rung]:
    """Train and judge every configuration; what `out` holds already is not done again.

    Args:
        settings: Settings of config G; `edm2.train.with_config` makes the others from them.
        plan: What to train and how to judge.
        out: Folder for runs and `ladder.json`. Several processes may share it, each with its own configurations; a
            last call with all of them collects the results.
        quiet: Whether to show nothing.

    Returns:
        One rung per configuration, in the plan's order; `ladder.json` holds the same.

    Raises:
        ValueError: If the data has no classes, the settings do not fit every configuration, or the folder holds an
            experiment with other settings.
    """
    out = Path(out)
    _check_folder(out, settings, plan)
    dataset = open_training_data(settings)
    if not dataset.num_classes:
        raise ValueError(
            f"{settings.data} has no classes, and the images are compared in features of a classifier: give labels"
        )
    prepared = {letter: _prepared(settings, letter, plan) for letter in plan.configs}
    judge = Judge(dataset)
    rungs: list[Rung] = []
    if not (out / _FILE).exists():
        _write(out, settings, plan, rungs)
    for letter, own in prepared.items():
        rung = Rung(config=letter)
        for factor in plan.rate_factors if len(plan.rate_factors) > 1 else ():
            config = _with_rate(own, factor, plan.rate_images, RATE_RUN_SEED)
            run = out / letter / f"rate-{factor:g}"
            rung.rate_scores[factor] = min(_trained(config, plan, judge, run, quiet)["by_length"])
        rung.rate_factor = min(plan.rate_factors, key=lambda factor: rung.rate_scores.get(factor, 0.0))
        for seed in plan.seeds:
            config = _with_rate(own, rung.rate_factor, own.num_images, seed)
            found = _trained(config, plan, judge, out / letter / f"seed-{seed}", quiet, final=True)
            rung.num_params = max(rung.num_params, found.pop("num_params"))
            for name, value in found.items():
                getattr(rung, name).append(value)
        rungs.append(rung)
        _write(out, settings, plan, rungs)
        if not quiet:
            show(
                f"config {letter}: Frechet distance {spread(rung.frechet)} at EMA length {spread(rung.sigma_rel)}"
            )
    return rungs


def _settings(settings: TrainConfig, plan: LadderPlan) -> dict[str, Any]:
    """Return what must stay the same when an experiment continues; configurations and seeds may be added.

    EMA lengths are an exception: they cost no training, and with others everything is judged again.
    """
    judged = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("configs", "seeds")}
    trained = {"num_images": settings.num_images, **settings.identity()}
    together: dict[str, Any] = json.loads(json.dumps({"plan": judged, "training": trained}))
    return together


def _check_folder(out: Path, settings: TrainConfig, plan: LadderPlan) -> None:
    if not (out / _FILE).exists():
        return
    known = flat_settings(_read(out / _FILE, "move it away to continue the runs").get("settings", {}))
    given = flat_settings(_settings(settings, plan))
    given["plan.sigma_rels"] = known.get("plan.sigma_rels")  # may change
    if known != given:
        raise ValueError(
            f"{out} holds an experiment with other settings ({difference(known, given)}): choose another --out, or "
            "give the same settings to continue it"
        )


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_sealed(path, finite=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def _write(out: Path, settings: TrainConfig, plan: LadderPlan, rungs: Sequence[Rung]) -> None:
    content = {
        "settings": _settings(settings, plan),
        "configs": plan.configs,
        "seeds": plan.seeds,
        "rungs": [dataclasses.asdict(rung) for rung in rungs],
    }
    write_sealed(out / _FILE, content)


def _prepared(settings: TrainConfig, letter: str, plan: LadderPlan) -> TrainConfig:
    config = with_config(settings, letter)
    if plan.dropout is None:
        return config
    return dataclasses.replace(config, network=dataclasses.replace(config.network, dropout=plan.dropout))


def _with_rate(config: TrainConfig, factor: float, num_images: int, seed: int) -> TrainConfig:
    config = with_length(config, num_images)
    optimizer = dataclasses.replace(config.optimizer, ref_lr=config.optimizer.ref_lr * factor)
    # Enough snapshots for every length, however short the run is.
    every = max(num_images // _MOMENTS, config.batch_size)
    return dataclasses.replace(
        config, optimizer=optimizer, seed=seed, snapshot_images=every, record_magnitudes=True
    )


def _trained(
    config: TrainConfig, plan: LadderPlan, judge: Judge, run: Path, quiet: bool, *, final: bool = False
) -> dict[str, Any]:
    """Train one run and judge it, or read what was found before with the same settings and images."""
    identity = json.dumps([_settings(config, plan), final, judge.fingerprint], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    cache = run / "judged.json"
    if cache.exists():
        known = _read(cache, "delete it to judge this run again")
        if known.pop("key", None) == key:
            return known
    try:
        train(config, run, quiet=quiet)
    except FloatingPointError:
        found = _diverged(plan)
    else:
        found = _judged(run, plan, judge, final, pick_device(config.device))
    write_sealed(cache, {"key": key, **found})
    return found


def _diverged(plan: LadderPlan) -> dict[str, Any]:
    """Result of a run that left the finite numbers, worse than any other."""
    return {"by_length": [math.inf] * len(plan.sigma_rels), "frechet": math.inf, "sigma_rel": math.nan,
            "images_per_second": math.nan, "activations": math.inf, "weights": math.inf, "num_params": 0}  # fmt: skip


def _judged(run: Path, plan: LadderPlan, judge: Judge, final: bool, device: torch.device) -> dict[str, Any]:
    search = range(SEARCH_SEED, SEARCH_SEED + plan.search_samples)
    tried = generators(run / SNAPSHOTS, plan.sigma_rels, device=device)
    by_length = [_score(judge, generator, search, plan) for generator in tried]
    if not final:
        return {"by_length": by_length}
    best = plan.sigma_rels[int(np.argmin(by_length))]
    (generator,) = generators(run / SNAPSHOTS, [best], device=device)
    seeds = range(FINAL_SEED, FINAL_SEED + plan.final_samples)
    log = read_log(run)
    activations, weights = growth(read_log(run, MAGNITUDES_FILE))
    return {
        "by_length": by_length,
        "frechet": _score(judge, generator, seeds, plan),
        "sigma_rel": best,
        "images_per_second": log[-1]["images_per_second"],
        "activations": activations[-1] if len(activations) > 1 else math.nan,
        "weights": weights[-1] if len(weights) > 1 else math.nan,
        "num_params": sum(p.numel() for p in generator.denoiser.parameters()),
    }


def _score(judge: Judge, generator: ImageGenerator, seeds: range, plan: LadderPlan) -> float:
    """Return the Frechet distance, infinite if the images are not finite."""
    try:
        return judge.score(generator, seeds, plan.num_steps, plan.sampler)
    except FloatingPointError:
        return math.inf


def growth(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return how activations (RMS of the largest block) and weights (RMS over layers) grow.

    Args:
        records: Lines of a run's `magnitudes.jsonl`.

    Returns:
        Activations and weights at each record over those at the first.
    """
    largest = [max(record["activations"].values()) for record in records]
    weights = [math.sqrt(statistics.fmean(v**2 for v in record["weights"].values())) for record in records]
    return [value / largest[0] for value in largest], [value / weights[0] for value in weights]


def spread(values: Sequence[float]) -> str:
    """Write the median, and the range if the values differ; NaN stands for unknown values, which do not count."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "unknown"
    low, middle, high = (f"{f(known):.3g}" for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"
