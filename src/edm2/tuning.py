"""The best generator that a run contains: EMA length, guide, guidance weight and interval, by a bounded search.

Ref: EDM2 Sec. 3.3 and 4 (lengths after training, guidance); arXiv 2406.02507 (a weaker guide); arXiv 2404.07724
(guidance in an interval).
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edm2.diffusion import save_model
from edm2.ema.snapshots import read_manifest
from edm2.files import write_json
from edm2.generate import Generator, reconstruct_denoiser, snapshots_of

# Seeds of samples; those of the final measurement were never seen by the search.
_SEARCH_SEED, _HELD_OUT_SEED = 3_000_000, 4_000_000
BASELINE_SIGMA_REL = 0.10
FOLDER = "tuning"
_LOG = "evaluations.jsonl"
_FOR_GUIDE_SEARCH = 1.5  # weight with which guides are compared, before the weight itself is searched


class Score(Protocol):
    """A number about images, lower being better."""

    fingerprint: str

    def distance(self, images: np.ndarray) -> float:
        """Of images, `[N, C, H, W]` uint8."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What is tuned.

    Attributes:
        sigma_rel: EMA length.
        guide_images: training images that the guide has seen: an earlier moment of the same run. None: no guide.
        guide_sigma_rel: the guide's EMA length.
        guidance: weight; 1 for none.
        interval: noise levels (low, high] where guidance acts.
    """

    sigma_rel: float
    guide_images: float | None = None
    guide_sigma_rel: float | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)

    def describe(self) -> str:
        """In words."""
        text = f"EMA {self.sigma_rel:g}"
        if self.guide_images is not None:
            text += f", guide of {self.guide_images:,.0f} images with EMA {self.guide_sigma_rel:g}"
            text += f", weight {self.guidance:g}"
        if self.interval != (0.0, math.inf):
            text += f" for sigma in ({self.interval[0]:g}, {self.interval[1]:g}]"
        return text


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """How far the search goes.

    Attributes:
        sigma_rels: EMA lengths tried.
        guide_moments: moments of the guide, as fractions of the run; the nearest snapshots are taken.
        guide_factors: the guide's EMA length, in units of the best length.
        weights: guidance weights tried.
        highs: upper ends of the interval tried.
        lows: lower ends of the interval tried.
        samples: images for each choice.
        final_samples: images for each final measurement.
        repeats: final measurements, each with seeds of its own.
        num_steps: of the sampler.
    """

    sigma_rels: tuple[float, ...] = (0.03, 0.05, 0.07, 0.09, 0.11, 0.14, 0.18, 0.25)
    guide_moments: tuple[float, ...] = (0.08, 0.16, 0.32, 0.6)
    guide_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    weights: tuple[float, ...] = (1.2, 1.35, 1.75, 2.0, 2.5)
    highs: tuple[float, ...] = (8.0, 3.0, 1.2)
    lows: tuple[float, ...] = (0.05, 0.2, 0.5)
    samples: int = 1000
    final_samples: int = 1000
    repeats: int = 3
    num_steps: int = 16

    def __post_init__(self) -> None:
        for name in ("samples", "final_samples", "repeats", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.sigma_rels:
            raise ValueError("sigma_rels is empty: give at least one EMA length")
        if any(not 0 < moment < 1 for moment in self.guide_moments):
            raise ValueError(f"guide_moments {self.guide_moments} must lie between 0 and 1, parts of the run")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One evaluation of the search.

    Attributes:
        stage: what was being searched.
        knobs: the settings.
        score: their score.
    """

    stage: str
    knobs: Knobs
    score: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search found.

    Attributes:
        best: the settings with the lowest score in the search.
        tried: all evaluations, in order.
        held_out: scores of `best`, one a repeat, with seeds that the search never saw.
        baseline: the same for EMA length 0.10 without guidance.
    """

    best: Knobs
    tried: list[Tried]
    held_out: list[float]
    baseline: list[float]

    @property
    def improvement(self) -> float:
        """Share by which the held-out score is lower than the baseline's."""
        return 1 - statistics.fmean(self.held_out) / statistics.fmean(self.baseline)


def tune(
    run: str | Path,
    score: Score,
    plan: TuningPlan,
    *,
    on_tried: Callable[[Tried, Tried], None] | None = None,
) -> Tuned:
    """Search one knob after the other, from the best so far; what was evaluated before is not evaluated again.

    The order: EMA length; the guide's moment and length together; guidance weight; the EMA length once more, with
    the guide; the interval's upper end, then its lower end.

    Args:
        run: folder of a training run.
        score: what to minimise.
        plan: how far to search.
        on_tried: called after each evaluation with it and the best so far.

    Returns:
        The best settings and everything that was tried. Evaluations lie in the run's folder `tuning`, so that an
        interrupted search continues.

    Raises:
        ValueError: if the run has no snapshots, or as in `edm2.ema.reconstruct`.
    """
    bench = _Bench(Path(run), score, plan)
    search = range(_SEARCH_SEED, _SEARCH_SEED + plan.samples)
    tried: list[Tried] = []

    def best() -> Tried:
        return min(tried, key=lambda t: t.score)

    for stage, propose in _stages(bench.moments, plan):
        for knobs in propose(best().knobs if tried else Knobs(sigma_rel=plan.sigma_rels[0])):
            if any(knobs == t.knobs for t in tried):
                continue
            tried.append(Tried(stage=stage, knobs=knobs, score=bench.evaluate(knobs, search)))
            if on_tried is not None:
                on_tried(tried[-1], best())
    blocks = [
        range(start, start + plan.final_samples)
        for start in range(
            _HELD_OUT_SEED, _HELD_OUT_SEED + plan.repeats * plan.final_samples, plan.final_samples
        )
    ]
    found = best().knobs
    baseline = Knobs(sigma_rel=BASELINE_SIGMA_REL)
    return Tuned(
        best=found,
        tried=tried,
        held_out=[bench.evaluate(found, block) for block in blocks],
        baseline=[bench.evaluate(baseline, block) for block in blocks],
    )


_Stage = tuple[str, Callable[[Knobs], Iterator[Knobs]]]


def _stages(moments: Sequence[float], plan: TuningPlan) -> list[_Stage]:
    replace = dataclasses.replace

    def lengths(best: Knobs) -> Iterator[Knobs]:
        return (replace(best, sigma_rel=s) for s in plan.sigma_rels)

    def guides(best: Knobs) -> Iterator[Knobs]:
        wanted = [fraction * moments[-1] for fraction in plan.guide_moments]
        near = sorted({min(moments, key=lambda m: abs(m - w)) for w in wanted})
        for images in near:
            for factor in plan.guide_factors:
                length = min(max(best.sigma_rel * factor, plan.sigma_rels[0]), plan.sigma_rels[-1])
                yield replace(best, guide_images=images, guide_sigma_rel=length, guidance=_FOR_GUIDE_SEARCH)

    def weights(best: Knobs) -> Iterator[Knobs]:
        return (replace(best, guidance=w) for w in plan.weights if best.guide_images is not None)

    def highs(best: Knobs) -> Iterator[Knobs]:
        return (replace(best, interval=(0.0, h)) for h in plan.highs if best.guide_images is not None)

    def lows(best: Knobs) -> Iterator[Knobs]:
        high = best.interval[1]
        return (
            replace(best, interval=(low, high))
            for low in plan.lows
            if best.guide_images is not None and low < high
        )

    return [
        ("EMA length", lengths),
        ("guide", guides),
        ("guidance weight", weights),
        ("EMA length with guide", lengths),
        ("interval, upper end", highs),
        ("interval, lower end", lows),
    ]


class _Bench:
    """Makes images by knobs and scores them; remembers what it did."""

    def __init__(self, run: Path, score: Score, plan: TuningPlan) -> None:
        self._run, self._score, self._num_steps = run, score, plan.num_steps
        manifest = read_manifest(snapshots_of(run))
        if not manifest.snapshots:
            raise ValueError(f"{run} has no snapshots yet: train on until the first is written")
        self.moments = sorted({s.t for s in manifest.snapshots})
        self._run_id = manifest.run.run_id
        self._log = run / FOLDER / _LOG
        self._known = self._read()
        self._generators: dict[tuple[float, float | None], Generator] = {}

    def evaluate(self, knobs: Knobs, seeds: range) -> float:
        """Score of the images of some seeds."""
        facts = [
            self._run_id,
            self.moments[-1],
            self._score.fingerprint,
            self._num_steps,
            seeds.start,
            len(seeds),
        ]
        text = json.dumps([facts, dataclasses.asdict(knobs)])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = self._score.distance(self.images(knobs, seeds))
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"key": key, "score": self._known[key], "knobs": knobs.describe()}) + "\n"
                )
        return self._known[key]

    def images(self, knobs: Knobs, seeds: range) -> np.ndarray:
        """Images of some seeds."""
        options: dict[str, Any] = {"num_steps": self._num_steps}
        if knobs.guide_images is not None:
            assert knobs.guide_sigma_rel is not None
            guide = self._generator(knobs.guide_sigma_rel, knobs.guide_images)
            options |= {"guide": guide, "guidance": knobs.guidance, "interval": knobs.interval}
        return self._generator(knobs.sigma_rel, None).images(seeds, **options)

    def _generator(self, sigma_rel: float, num_images: float | None) -> Generator:
        key = (sigma_rel, num_images)
        if key not in self._generators:
            # Two networks are all that an evaluation needs: a large model must not fill the memory.
            while len(self._generators) >= 2:
                self._generators.pop(next(iter(self._generators)))
            self._generators[key] = Generator.load(self._run, sigma_rel, num_images=num_images)
        return self._generators[key]

    def _read(self) -> dict[str, float]:
        known = {}
        if self._log.exists():
            for line in self._log.read_text().splitlines():
                try:
                    record = json.loads(line)
                    known[str(record["key"])] = float(record["score"])
                except (ValueError, KeyError, TypeError):
                    break  # cut short by a kill
        return known


def save_tuned(run: str | Path, tuned: Tuned, plan: TuningPlan) -> Path:
    """Write the best settings, where `edm2 sample RUN` finds them, and the networks that they need.

    Returns:
        The folder, `tuning` in the run's, with tuned.json, model.safetensors and, with guidance,
        guide.safetensors. Those of an earlier search are replaced.
    """
    folder = Path(run) / FOLDER
    networks: dict[str, tuple[float, float | None]] = {"model": (tuned.best.sigma_rel, None)}
    if tuned.best.guide_images is not None and tuned.best.guide_sigma_rel is not None:
        networks["guide"] = (tuned.best.guide_sigma_rel, tuned.best.guide_images)
    (folder / "guide.safetensors").unlink(missing_ok=True)
    for name, (sigma_rel, num_images) in networks.items():
        denoiser, info = reconstruct_denoiser(run, sigma_rel, num_images)
        save_model(
            folder / f"{name}.safetensors", denoiser.config, denoiser.state_dict(), info, overwrite=True
        )
    path = folder / "tuned.json"
    content = {
        "knobs": _json(tuned.best),
        "num_steps": plan.num_steps,
        "held_out": tuned.held_out,
        "baseline": tuned.baseline,
        "improvement": tuned.improvement,
        "tried": [{"stage": t.stage, "score": t.score, "knobs": _json(t.knobs)} for t in tuned.tried],
    }
    write_json(path, content)
    return folder


def read_tuned(run: str | Path) -> tuple[Knobs, int] | None:
    """Settings and number of sampling steps that `save_tuned` wrote, or None where there are none.

    Raises:
        ValueError: if the file is damaged.
    """
    path = Path(run) / FOLDER / "tuned.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        knobs = content["knobs"]
        low, high = knobs.pop("interval")
        return Knobs(**knobs, interval=(low, math.inf if high is None else high)), int(content["num_steps"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run `edm2 tune` again, it reuses what it knows"
        ) from error


def _json(knobs: Knobs) -> dict[str, Any]:
    low, high = knobs.interval
    return {**dataclasses.asdict(knobs), "interval": [low, None if high == math.inf else high]}
