"""The ladder as an experiment: configurations A to G trained alike, each judged at its own best EMA length.

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

from edm2.diffusion import SamplerName, find_sampler
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.evaluation.judge import Judge
from edm2.files import write_json
from edm2.generate import ImageGenerator
from edm2.generate.lengths import generators
from edm2.nn import CONFIGS
from edm2.progress import show
from edm2.train import TrainConfig, train
from edm2.train.build import open_training_data, pick_device
from edm2.train.logs import MAGNITUDES_FILE, read_log
from edm2.train.run_folder import SNAPSHOTS, flat_settings
from edm2.train.with_config import with_config

# Seeds of samples: the search for rate and length never sees those that the result is measured with.
_SEARCH_SEED, _FINAL_SEED = 1_000_000, 2_000_000
_RATE_RUN_SEED = 1_000
_MOMENTS = 16
_MAX_RAMPUP = 0.1  # of a run
_FILE = "ladder.json"


@dataclass(frozen=True, kw_only=True)
class LadderPlan:
    """What is trained and how it is judged; the same for every configuration.

    Attributes:
        configs: letters, in the order of the table.
        seeds: of the training runs.
        dropout: probability in every configuration; default: each one's own, 0.1 in A to F unless the settings say
            another, 0 in G.
        rate_factors: tried on the learning rate that the paper's proportions give, in runs of their own; the
            factor with the lowest Frechet distance is used. One factor: no search.
        rate_images: length of these runs.
        sigma_rels: EMA lengths tried after training.
        search_samples: images for each choice, of learning rate and of EMA length.
        final_samples: images for the result.
        num_steps: of the sampler.
        sampler: name in `edm2.diffusion.SAMPLERS`.
    """

    configs: tuple[str, ...] = tuple(CONFIGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    dropout: float | None = None
    rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    rate_images: int = 10_000
    sigma_rels: tuple[float, ...] = (0.03, 0.05, 0.075, 0.10, 0.14, 0.20, 0.25)
    search_samples: int = 500
    final_samples: int = 1000
    num_steps: int = 16
    sampler: SamplerName = "heun"

    def __post_init__(self) -> None:
        unknown = [c for c in self.configs if c not in CONFIGS]
        if unknown:
            raise ValueError(f"config {unknown[0]!r} is not one of {', '.join(CONFIGS)}")
        for name in ("configs", "seeds", "rate_factors", "sigma_rels"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {values} must be one or more different values")
        least = {"rate_images": 1, "search_samples": 2, "final_samples": 2, "num_steps": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {lowest}")
        sigma_rel_to_gamma(self.sigma_rels)
        if _RATE_RUN_SEED in self.seeds:
            raise ValueError(f"seed {_RATE_RUN_SEED} is that of the search for rates: choose others")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds} must be 0 or more")
        if not all(0 < factor < math.inf for factor in self.rate_factors):
            raise ValueError(f"rate_factors {self.rate_factors} must be above 0 and finite")
        if self.search_samples > _FINAL_SEED - _SEARCH_SEED:
            raise ValueError(
                f"search_samples {self.search_samples} must be at most {_FINAL_SEED - _SEARCH_SEED}: more would be "
                "judged again in the result"
            )
        find_sampler(self.sampler)


@dataclass(kw_only=True)
class Rung:
    """What came out for one configuration.

    Attributes:
        config: its letter.
        rate_scores: Frechet distance by factor on the learning rate; empty without a search.
        rate_factor: the factor used.
        frechet: distance of each seed, at that run's best EMA length.
        sigma_rel: that length, of each seed.
        by_length: Frechet distance in the search by EMA length, of each seed.
        images_per_second: of each seed.
        activations: RMS of block outputs, the largest block's, in the last record over the first, of each seed. The
            first record is not that of the initial network: it comes after the first `log_images` of training; NaN
            where it is the only one.
        weights: RMS of the weights, likewise.
        num_params: parameters; 0 where every run diverged.
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
    """Train and judge every configuration; what is done already, in `out`, is not done again.

    Args:
        settings: of config G; the others are made of it by `edm2.train.with_config.with_config`.
        plan: see `LadderPlan`.
        out: folder for runs and `ladder.json`. Several processes may share it, each with its own configurations;
            a last call with all of them puts the results together.
        quiet: show no progress.

    Returns:
        One rung a configuration, in the plan's order; `ladder.json` holds the same.

    Raises:
        ValueError: for data without classes, settings that do not fit every configuration, or a folder that
            holds runs of other settings.
    """
    out = Path(out)
    _check_folder(out, settings, plan)
    dataset = open_training_data(settings)
    if not dataset.num_classes:
        raise ValueError(
            f"{settings.data} has no classes: the features to compare in come from a classifier of them; give labels"
        )
    prepared = {letter: _prepared(settings, letter, plan) for letter in plan.configs}
    judge = Judge(dataset)
    rungs: list[Rung] = []
    if not (out / _FILE).exists():
        _write(out, settings, plan, rungs)
    for letter, own in prepared.items():
        rung = Rung(config=letter)
        for factor in plan.rate_factors if len(plan.rate_factors) > 1 else ():
            config = _with_rate(own, factor, plan.rate_images, _RATE_RUN_SEED)
            run = out / letter / f"rate-{factor:g}"
            rung.rate_scores[factor] = min(_trained(config, plan, judge, run, quiet)["by_length"])
        rung.rate_factor = (
            min(rung.rate_scores, key=rung.rate_scores.__getitem__)
            if rung.rate_scores
            else plan.rate_factors[0]
        )
        for seed in plan.seeds:
            config = _with_rate(own, rung.rate_factor, own.num_images, seed)
            found = _trained(config, plan, judge, out / letter / f"seed-{seed}", quiet, final=True)
            rung.num_params = max(rung.num_params, found.pop("num_params"))
            for name, value in found.items():
                getattr(rung, name).append(value)
        rungs.append(rung)
        _write(out, settings, plan, rungs)
        if not quiet:
            show(_line(rung))
    return rungs


def with_length(
    config: TrainConfig, num_images: int | None = None, batch_size: int | None = None
) -> TrainConfig:
    """The same run with another length or batch, and a learning rate that takes the same course.

    The rate decays from the same share of the run on, where it decays. The ramp-up keeps its length, because Adam's
    moments need so many steps in a short run too, but is never more than a tenth of the run.

    Args:
        config: any settings.
        num_images: length in images; default: the same.
        batch_size: images a step; default: the same.

    Raises:
        ValueError: for a length or batch below 1.
    """
    resized = dataclasses.replace(
        config,
        num_images=config.num_images if num_images is None else num_images,
        batch_size=config.batch_size if batch_size is None else batch_size,
    )
    stretch = (resized.num_images / config.num_images) / (resized.batch_size / config.batch_size)
    optimizer = dataclasses.replace(
        config.optimizer,
        ref_batches=config.optimizer.ref_batches * stretch,
        rampup_mimg=min(config.optimizer.rampup_mimg, _MAX_RAMPUP * resized.num_images / 1e6),
    )
    return dataclasses.replace(resized, optimizer=optimizer)


def _settings(settings: TrainConfig, plan: LadderPlan) -> dict[str, Any]:
    """What must stay the same when an experiment is continued; configurations and seeds may be added.

    But for the EMA lengths, which cost no training: with others, everything is judged again.
    """
    judged = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("configs", "seeds")}
    trained = {"num_images": settings.num_images, **settings.identity()}
    together: dict[str, Any] = json.loads(json.dumps({"plan": judged, "training": trained}))
    return together


def _check_folder(out: Path, settings: TrainConfig, plan: LadderPlan) -> None:
    if not (out / _FILE).exists():
        return
    try:
        known = flat_settings(json.loads((out / _FILE).read_text())["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out / _FILE} is damaged ({error}): move it away to continue the runs") from error
    given = flat_settings(_settings(settings, plan))
    # Other lengths can be made of the same runs, which are then judged again.
    fixed = sorted((known.keys() | given.keys()) - {"plan.sigma_rels"})
    other = [name for name in fixed if known.get(name) != given.get(name)]
    if other:
        parts = [f"{name} {known.get(name)} there, {given.get(name)} here" for name in other[:4]]
        raise ValueError(
            f"{out} holds an experiment with other settings ({'; '.join(parts)}): choose another --out, or give the "
            "same settings to continue it"
        )


def _write(out: Path, settings: TrainConfig, plan: LadderPlan, rungs: Sequence[Rung]) -> None:
    content = {
        "settings": _settings(settings, plan),
        "configs": plan.configs,
        "seeds": plan.seeds,
        "rungs": [dataclasses.asdict(rung) for rung in rungs],
    }
    write_json(out / _FILE, content)


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
        try:
            known: dict[str, Any] = json.loads(cache.read_text())
            same = known.pop("key") == key
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{cache} is damaged ({error}): delete it to judge this run again") from error
        if same:
            return known
    try:
        train(config, run, quiet=quiet)
    except FloatingPointError:
        found = _diverged(plan)
    else:
        found = _judged(run, plan, judge, final, pick_device(config.device))
    write_json(cache, {"key": key, **found})
    return found


def _diverged(plan: LadderPlan) -> dict[str, Any]:
    """Of a run that left the finite numbers: worse than any other."""
    return {"by_length": [math.inf] * len(plan.sigma_rels), "frechet": math.inf, "sigma_rel": math.nan,
            "images_per_second": math.nan, "activations": math.inf, "weights": math.inf, "num_params": 0}  # fmt: skip


def _judged(run: Path, plan: LadderPlan, judge: Judge, final: bool, device: torch.device) -> dict[str, Any]:
    search = range(_SEARCH_SEED, _SEARCH_SEED + plan.search_samples)
    tried = generators(run / SNAPSHOTS, plan.sigma_rels, device=device)
    by_length = [_score(judge, generator, search, plan) for generator in tried]
    if not final:
        return {"by_length": by_length}
    best = plan.sigma_rels[int(np.argmin(by_length))]
    (generator,) = generators(run / SNAPSHOTS, [best], device=device)
    seeds = range(_FINAL_SEED, _FINAL_SEED + plan.final_samples)
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
    """Frechet distance, infinite for a network that trained into uselessness with weights still finite."""
    try:
        return judge.score(generator, seeds, plan.num_steps, plan.sampler)
    except FloatingPointError:
        return math.inf


def growth(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """How far activations, the largest block's RMS, and weights, their RMS over layers, have moved.

    Args:
        records: lines of a run's `magnitudes.jsonl`.

    Returns:
        Activations and weights at each record over those at the first.
    """
    largest = [max(record["activations"].values()) for record in records]
    weights = [_rms(record["weights"]) for record in records]
    return [value / largest[0] for value in largest], [value / weights[0] for value in weights]


def _rms(values: dict[str, float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values.values()))


def _line(rung: Rung) -> str:
    return f"config {rung.config}: Frechet distance {spread(rung.frechet)} at EMA length {spread(rung.sigma_rel)}"


def spread(values: Sequence[float]) -> str:
    """Median, and the range where the values differ; those that are not known, NaN, do not count."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "unknown"
    low, middle, high = (f"{f(known):.3g}" for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"
