"""The best generator that a run contains: EMA length, guide, guidance weight and interval, by a bounded search.

Ref: EDM2 Sec. 3.3 and 4 (lengths after training, guidance); arXiv 2406.02507 (a weaker guide); arXiv 2404.07724
(guidance in an interval).
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from edm2.diffusion import SamplerName, find_sampler, time_steps
from edm2.ema import reconstruct_many
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.storage.manifest import read_manifest
from edm2.generate import ImageGenerator, snapshots_of
from edm2.tuning.result import BASELINE_SIGMA_REL, FOLDER, Knobs, Tried, Tuned

# Seeds of samples; those of the final measurement were never seen by the search.
_SEARCH_SEED, _HELD_OUT_SEED = 3_000_000, 4_000_000
_LOG = "evaluations.jsonl"
_FOR_GUIDE_SEARCH = 1.5  # weight with which guides are compared, before the weight itself is searched


class Score(Protocol):
    """A number about images, lower being better.

    Attributes:
        fingerprint: tells this number from any other.
        metric: what it is, in words, such as "Frechet distance".
        features: what it is measured in, in words.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102 - described above
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def features(self) -> str: ...  # noqa: D102

    def distance(self, images: np.ndarray) -> float:
        """Of images, `[N, C, H, W]` uint8."""


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """How far the search goes.

    Attributes:
        sigma_rels: EMA lengths tried, ascending.
        guide_moments: moments of the guide, as fractions of the run; the nearest snapshots are taken.
        guide_factors: the guide's EMA length, in units of the best length.
        guide: a model file, or a run with EMA lengths of its own, that is tried as guide beside the run's moments:
            an unconditional network, or a weaker one.
        guidances: guidance weights tried.
        highs: upper ends of the interval tried.
        lows: lower ends of the interval tried.
        samples: images for each choice.
        final_samples: images for each final measurement.
        repeats: final measurements, each with seeds of its own.
        num_steps: of the sampler.
        sampler: Heun runs the network twice on each noise level but the last, the others once.
    """

    sigma_rels: tuple[float, ...] = (0.03, 0.05, 0.07, 0.09, 0.11, 0.14, 0.18, 0.25)
    guide_moments: tuple[float, ...] = (0.08, 0.16, 0.32, 0.6)
    guide_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    guide: Path | None = None
    guidances: tuple[float, ...] = (1.2, 1.35, 1.75, 2.0, 2.5)
    highs: tuple[float, ...] = (8.0, 3.0, 1.2)
    lows: tuple[float, ...] = (0.05, 0.2, 0.5)
    samples: int = 1000
    final_samples: int = 1000
    repeats: int = 3
    num_steps: int = 16
    sampler: SamplerName = "heun"

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("final_samples", 2), ("repeats", 1), ("num_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.samples > _HELD_OUT_SEED - _SEARCH_SEED:
            raise ValueError(
                f"samples {self.samples} would reach the held-out seeds: at most {_HELD_OUT_SEED - _SEARCH_SEED}"
            )
        if not self.sigma_rels:
            raise ValueError("sigma_rels is empty: give at least one EMA length")
        sigma_rel_to_gamma(self.sigma_rels)
        if list(self.sigma_rels) != sorted(set(self.sigma_rels)):
            raise ValueError(f"sigma_rels {self.sigma_rels} must ascend, each length once")
        if any(not 0 < moment < 1 for moment in self.guide_moments):
            raise ValueError(f"guide_moments {self.guide_moments} must lie between 0 and 1, parts of the run")
        for name in ("guide_factors", "guidances", "highs", "lows"):
            if any(not 0 < value < math.inf for value in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be positive and finite")
        for name in ("guide_moments", "guide_factors", "guidances", "highs", "lows"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be different values")
        highest, lowest, _ = time_steps(2).tolist()
        if any(high < lowest for high in self.highs) or any(low >= highest for low in self.lows):
            raise ValueError(
                f"highs {self.highs} and lows {self.lows} must be ends of intervals that hold some of the sampler's "
                f"noise levels, {lowest:g} to {highest:g}"
            )
        find_sampler(self.sampler)

    @property
    def most_evaluations(self) -> int:
        """Most settings that the search tries; each is one set of images."""
        guides = len(self.guide_moments) * len(self.guide_factors)
        if self.guide is not None:
            guides += len(self.guide_factors) if _has_snapshots(self.guide) else 1
        rest = len(self.guidances) + len(self.highs) + len(self.lows)
        return 2 * len(self.sigma_rels) + guides + rest


def tune(
    run: str | Path,
    score: Score,
    plan: TuningPlan,
    *,
    device: torch.device | str = "cpu",
    on_tried: Callable[[Tried, Tried], None] | None = None,
) -> Tuned:
    """Search one knob after the other, from the best so far; what was evaluated before is not evaluated again.

    The order: EMA length; the guide, which is the plan's or a moment of the run, and its length; guidance weight; the
    EMA length once more, with the guide; the interval's upper end, then its lower end. A guide that did harm at the
    weight of its search gets a chance at the lower weights; where it helps at none, what remains of the search is
    skipped. So are settings that give the images of others, such as an interval with the same noise levels in it.
    Settings with an average that the snapshots cannot give, such as a long one at an early moment, are skipped with a
    warning, like those that leave the finite numbers.

    Args:
        run: folder of a training run.
        score: what to minimise.
        plan: how far to search.
        device: where images are made.
        on_tried: called after each evaluation with it and the best so far.

    Returns:
        The best settings and everything that was tried. Evaluations lie in the run's folder `tuning`, so that an
        interrupted search continues.

    Raises:
        ValueError: if the run has no snapshots, or they give none of the lengths, or not that of the comparison; for
            a guide that does not fit.
        FloatingPointError: if the images of the comparison are not finite.
    """
    bench = _Bench(Path(run), score, plan, device)
    compared = Knobs(sigma_rel=BASELINE_SIGMA_REL)
    if refusal := bench.refusal(compared):
        raise ValueError(f"there is nothing to compare tuned settings with: {refusal}")
    search = range(_SEARCH_SEED, _SEARCH_SEED + plan.samples)
    tried: list[Tried] = []
    effects = set()
    for stage, propose in _stages(bench.moments, plan):
        for knobs in propose(tried):
            effect = bench.effect(knobs)
            if effect in effects:
                continue
            effects.add(effect)
            if refusal := bench.refusal(knobs):
                warnings.warn(f"skipped {knobs.describe()}: {refusal}", stacklevel=2)
                continue
            try:
                tried.append(Tried(stage=stage, knobs=knobs, score=bench.evaluate(knobs, search)))
            except FloatingPointError as error:
                warnings.warn(f"skipped {knobs.describe()}: {error}", stacklevel=2)
                continue
            if on_tried is not None:
                on_tried(tried[-1], _best(tried))
        if not tried:
            raise ValueError(f"the snapshots of {run} give none of the EMA lengths {plan.sigma_rels}")
    starts = [_HELD_OUT_SEED + i * plan.final_samples for i in range(plan.repeats)]
    found, baseline = (
        [bench.evaluate(knobs, range(start, start + plan.final_samples)) for start in starts]
        for knobs in (_best(tried).knobs, compared)
    )
    return Tuned(
        best=_best(tried).knobs,
        num_steps=plan.num_steps,
        sampler=plan.sampler,
        tried=tried,
        held_out=found,
        baseline=baseline,
        metric=score.metric,
        features=score.features,
    )


def check_guide(run: str | Path, guide: Path) -> ImageGenerator:
    """Open the guide that a plan names.

    Returns:
        It; of a run, with the EMA length of the comparison.

    Raises:
        ValueError: as in `ImageGenerator.load`, or if it does not fit the run.
    """
    length = BASELINE_SIGMA_REL if _has_snapshots(guide) else None
    opened = ImageGenerator.load(guide, length)
    ImageGenerator.load(run, BASELINE_SIGMA_REL).check_guide(opened)
    return opened


def _best(tried: Sequence[Tried]) -> Tried:
    return min(tried, key=lambda t: t.score)


_Stage = tuple[str, Callable[[Sequence[Tried]], Iterator[Knobs]]]


def _stages(moments: Sequence[float], plan: TuningPlan) -> list[_Stage]:
    """Names of the stages, and what each proposes after what was tried."""
    replace = dataclasses.replace

    def lengths(tried: Sequence[Tried]) -> Iterator[Knobs]:
        start = _best(tried).knobs if tried else Knobs(sigma_rel=plan.sigma_rels[0])
        return (replace(start, sigma_rel=s) for s in plan.sigma_rels)

    def guides(tried: Sequence[Tried]) -> Iterator[Knobs]:
        start = replace(_best(tried).knobs, guidance=_FOR_GUIDE_SEARCH)
        shortest, longest = plan.sigma_rels[0], plan.sigma_rels[-1]
        own = [min(max(start.sigma_rel * factor, shortest), longest) for factor in plan.guide_factors]
        if plan.guide is not None:
            for length in own if _has_snapshots(plan.guide) else [None]:
                yield replace(start, guide=str(plan.guide), guide_sigma_rel=length)
        wanted = [fraction * moments[-1] for fraction in plan.guide_moments]
        for images in sorted({min(moments, key=lambda m: abs(m - w)) for w in wanted}):
            for length in own:
                yield replace(start, guide_images=images, guide_sigma_rel=length)

    def weights(tried: Sequence[Tried]) -> Iterator[Knobs]:
        guided = [t for t in tried if t.knobs.is_guided]
        if guided:
            start, helps = _best(guided).knobs, _best(tried) in guided
            for weight in plan.guidances:
                if helps or weight < _FOR_GUIDE_SEARCH:
                    yield replace(start, guidance=weight)

    def highs(tried: Sequence[Tried]) -> Iterator[Knobs]:
        start = _best(tried).knobs
        return (replace(start, interval=(0.0, high)) for high in plan.highs)

    def lows(tried: Sequence[Tried]) -> Iterator[Knobs]:
        start = _best(tried).knobs
        high = start.interval[1]
        return (replace(start, interval=(low, high)) for low in plan.lows if low < high)

    return [
        ("EMA length", lengths),
        ("guide", guides),
        ("guidance weight", weights),
        ("EMA length with guide", lengths),
        ("interval, upper end", highs),
        ("interval, lower end", lows),
    ]


def _has_snapshots(guide: Path) -> bool:
    return guide.is_dir() and snapshots_of(guide) != guide


# What a network is put together from: run or model file, EMA length, moment.
_Network = tuple[Path, float | None, float | None]


class _Bench:
    """Makes images by knobs and scores them; remembers what it did."""

    def __init__(self, run: Path, score: Score, plan: TuningPlan, device: torch.device | str) -> None:
        self._run, self._score, self._device = run, score, device
        self._options: dict[str, Any] = {"num_steps": plan.num_steps, "sampler": plan.sampler}
        self._levels: list[float] = time_steps(plan.num_steps)[:-1].tolist()
        manifest = read_manifest(snapshots_of(run))
        if not manifest.snapshots:
            raise ValueError(f"{run} has no snapshots yet: train on until the first is written")
        self.moments = sorted({s.t for s in manifest.snapshots})
        self._run_id = manifest.run.run_id
        self._log = run / FOLDER / _LOG
        self._known = self._read()
        self._generators: dict[_Network, ImageGenerator] = {}
        self._refusals: dict[_Network, str] = {}
        guide = None if plan.guide is None else check_guide(run, plan.guide).identity()
        self._guide_identity = json.dumps(guide, sort_keys=True)

    def refusal(self, knobs: Knobs) -> str:
        """Why the snapshots cannot give one of the networks; empty where they can."""
        for network in self._networks(knobs):
            source, length, moment = network
            if length is not None and network not in self._refusals:
                self._refusals[network] = ""
                try:
                    reconstruct_many(snapshots_of(source), [length], moment, warn_above=math.inf, read=False)
                except ValueError as error:
                    self._refusals[network] = str(error)
            if refusal := self._refusals.get(network):
                return refusal
        return ""

    def _networks(self, knobs: Knobs) -> list[_Network]:
        """The model and, if there is one, its guide."""
        networks: list[_Network] = [(self._run, knobs.sigma_rel, None)]
        if knobs.is_guided:
            source = self._run if knobs.guide is None else Path(knobs.guide)
            networks.append((source, knobs.guide_sigma_rel, knobs.guide_images))
        return networks

    def effect(self, knobs: Knobs) -> tuple[object, ...]:
        """What the images depend on; equal for knobs that give the same images."""
        low, high = knobs.interval
        levels = tuple(level for level in self._levels if low < level <= high)
        itself = (knobs.guide_images, knobs.guide_sigma_rel) == (self.moments[-1], knobs.sigma_rel)
        if not knobs.is_guided or knobs.guidance == 1 or itself or not levels:
            return (knobs.sigma_rel,)
        return (*self._networks(knobs), knobs.guidance, levels)

    def evaluate(self, knobs: Knobs, seeds: range) -> float:
        """Score of the images of some seeds."""
        facts = [
            self._run_id,
            self.moments[-1],
            self._score.fingerprint,
            self._options,
            seeds.start,
            len(seeds),
        ]
        settings = dataclasses.asdict(knobs)
        # By what is in it and not by its path; left out where there is none, as before there were such guides.
        if settings.pop("guide") is not None:
            settings["guide"] = self._guide_identity
        text = json.dumps([facts, settings])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = self._score.distance(self.images(knobs, seeds))
            self._log.parent.mkdir(parents=True, exist_ok=True)
            record = {"key": key, "score": self._known[key], "knobs": knobs.describe(), "seed": seeds.start}
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return self._known[key]

    def images(self, knobs: Knobs, seeds: range) -> np.ndarray:
        """Images of some seeds."""
        options = dict(self._options)
        model, *guides = [self._generator(network) for network in self._networks(knobs)]
        if guides:
            options |= {"guide": guides[0], "guidance": knobs.guidance, "interval": knobs.interval}
        return model.images(seeds, **options)

    def _generator(self, network: _Network) -> ImageGenerator:
        source, sigma_rel, num_images = network
        found = self._generators.pop(network, None)
        found = found or ImageGenerator.load(source, sigma_rel, num_images=num_images, device=self._device)
        # Two networks are all that an evaluation needs: a large model must not fill the memory.
        while len(self._generators) >= 2:
            self._generators.pop(next(iter(self._generators)))
        self._generators[network] = found  # at the end, as the one used last
        return found

    def _read(self) -> dict[str, float]:
        known: dict[str, float] = {}
        if not self._log.exists():
            return known
        text = self._log.read_text()
        if text and not text.endswith("\n"):
            with open(self._log, "a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                known[str(record["key"])] = float(record["score"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill
        return known
