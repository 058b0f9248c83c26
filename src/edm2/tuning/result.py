"""What a search for the best settings of a run found, and where `edm2 sample RUN` finds it again."""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2.diffusion import MODEL_FILE, load_model, save_model
from edm2.evaluation.judge import FRECHET, OWN_CLASSIFIER
from edm2.files import write_json
from edm2.generate import reconstruct_denoiser

BASELINE_SIGMA_REL = 0.10
FOLDER = "tuning"
GUIDE_FILE = "guide.safetensors"
_FILE = "tuned.json"
# Student's t, two-sided 95%, of 1 to 10 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What is tuned.

    Attributes:
        sigma_rel: EMA length.
        guide_images: training images that the guide has seen, where it is an earlier moment of the same run.
        guide_sigma_rel: the guide's EMA length, where it is put together from snapshots.
        guidance: weight; 1 for none.
        interval: noise levels (low, high] where guidance acts.
        guide: model file or run that guides, where it is not the same run.
    """

    sigma_rel: float
    guide_images: float | None = None
    guide_sigma_rel: float | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    guide: str | None = None

    @property
    def is_guided(self) -> bool:
        """Whether there is a guide."""
        return self.guide is not None or self.guide_images is not None

    def describe(self) -> str:
        """In words."""
        text = f"EMA {self.sigma_rel:g}"
        if self.is_guided:
            text += f", guide {self.guide or f'of {self.guide_images:,.0f} images'}"
            if self.guide_sigma_rel is not None:
                text += f" with EMA {self.guide_sigma_rel:g}"
            text += f", weight {self.guidance:g}"
        if self.interval != (0.0, math.inf):
            text += f" for sigma in ({self.interval[0]:g}, {self.interval[1]:g}]"
        return text


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
        num_steps: of the sampler.
        sampler: its name.
        tried: all evaluations, in order.
        held_out: scores of `best`, one a repeat, with seeds that the search never saw.
        baseline: the same for EMA length 0.10 without guidance; each repeat has the seeds of the one in `held_out`.
        metric: what a score is, in words.
        features: what it is measured in, in words.
    """

    best: Knobs
    num_steps: int
    sampler: str
    tried: list[Tried]
    held_out: list[float]
    baseline: list[float]
    metric: str = FRECHET
    features: str = OWN_CLASSIFIER

    @property
    def is_share(self) -> bool:
        """Whether improvements are shares of the baseline, which must be clearly positive for that.

        A Frechet distance is never negative. What may be, as a kernel distance, is clearly positive where the 95%
        confidence interval of its mean is; one repeat cannot tell.
        """
        if min(self.baseline) <= 0:
            return False
        error = half_interval(self.baseline)
        return self.metric == FRECHET or (error is not None and statistics.fmean(self.baseline) > error)

    @property
    def improvements(self) -> list[float]:
        """How much lower the held-out score is than the baseline's with the same seeds, one a repeat.

        Shares of the baseline with `is_share`, else differences.
        """
        pairs = zip(self.held_out, self.baseline, strict=True)
        share = self.is_share
        return [1 - ours / theirs if share else theirs - ours for ours, theirs in pairs]

    @property
    def improvement(self) -> float:
        """Mean of `improvements`."""
        return statistics.fmean(self.improvements)

    @property
    def improvement_error(self) -> float | None:
        """Half the 95% confidence interval of `improvement` (Student's t); None with one repeat."""
        return half_interval(self.improvements)


def half_interval(values: list[float]) -> float | None:
    """Half the 95% confidence interval of the mean of independent values, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    # Beyond the table the expansion in 1 / freedom (Cornish-Fisher) is good to 0.002.
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.372 / freedom + 2.82 / freedom**2
    return t * statistics.stdev(values) / math.sqrt(len(values))


def save_tuned(run: str | Path, tuned: Tuned) -> Path:
    """Write the best settings, where `edm2 sample RUN` finds them, and the networks that they need.

    Returns:
        The folder, `tuning` in the run's, with tuned.json, model.safetensors and, with guidance,
        guide.safetensors. Those of an earlier search are replaced.
    """
    folder, knobs = Path(run) / FOLDER, tuned.best
    networks = {MODEL_FILE: reconstruct_denoiser(run, knobs.sigma_rel)}
    if knobs.is_guided:
        source = knobs.guide or run
        networks[GUIDE_FILE] = (
            load_model(source)
            if knobs.guide_sigma_rel is None
            else reconstruct_denoiser(source, knobs.guide_sigma_rel, knobs.guide_images)
        )
    # Only now, because the guide may have been this file.
    (folder / GUIDE_FILE).unlink(missing_ok=True)
    for name, (denoiser, info) in networks.items():
        save_model(folder / name, denoiser.config, denoiser.state_dict(), info, overwrite=True)
    content = {
        "knobs": _json(tuned.best),
        "metric": tuned.metric,
        "features": tuned.features,
        "num_steps": tuned.num_steps,
        "sampler": tuned.sampler,
        "held_out": tuned.held_out,
        "baseline": tuned.baseline,
        "is_share": tuned.is_share,
        "improvements": tuned.improvements,
        "improvement": tuned.improvement,
        "improvement_error": tuned.improvement_error,
        "tried": [{"stage": t.stage, "score": t.score, "knobs": _json(t.knobs)} for t in tuned.tried],
    }
    write_json(folder / _FILE, content)
    return folder


def read_tuned(run: str | Path) -> Tuned | None:
    """What `save_tuned` wrote for a run, or None where it was not tuned.

    Raises:
        ValueError: if the file is damaged.
    """
    path = Path(run) / FOLDER / _FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return Tuned(
            best=_knobs(content["knobs"]),
            num_steps=int(content["num_steps"]),
            sampler=str(content["sampler"]),
            tried=[
                Tried(stage=str(t["stage"]), knobs=_knobs(t["knobs"]), score=float(t["score"]))
                for t in content["tried"]
            ],
            held_out=[float(score) for score in content["held_out"]],
            baseline=[float(score) for score in content["baseline"]],
            metric=str(content.get("metric", FRECHET)),
            features=str(content.get("features", OWN_CLASSIFIER)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run `edm2 tune` again, it reuses what it knows"
        ) from error


def _knobs(content: dict[str, Any]) -> Knobs:
    low, high = content["interval"]
    images, length, guide = content["guide_images"], content["guide_sigma_rel"], content.get("guide")
    if guide is None and (images is None) != (length is None):
        raise ValueError("a guide needs both its moment and its EMA length")
    if not isinstance(guide, str | None):
        raise ValueError("a guide is named by its path")
    return Knobs(
        sigma_rel=float(content["sigma_rel"]),
        guide_images=None if images is None else float(images),
        guide_sigma_rel=None if length is None else float(length),
        guidance=float(content["guidance"]),
        interval=(float(low), math.inf if high is None else float(high)),
        guide=guide,
    )


def _json(knobs: Knobs) -> dict[str, Any]:
    low, high = knobs.interval
    return {**dataclasses.asdict(knobs), "interval": [low, None if high == math.inf else high]}
