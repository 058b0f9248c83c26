"""What a search found, and the files in a run's folder that keep it for `edm2 sample RUN`."""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edm2.diffusion import MODEL_FILE, find_sampler, load_model, save_model
from edm2.ema.storage.manifest import Time, Width, read_manifest
from edm2.evaluation.judge import FRECHET, OWN_CLASSIFIER
from edm2.files import Range, from_json, read_sealed, write_sealed
from edm2.generate import reconstruct_denoiser, snapshots_of
from edm2.train.consistency import IGNORES_LABELS
from edm2.tuning.plan import SELF

BASELINE_SIGMA_REL = 0.10
FOLDER = "tuning"
GUIDE_FILE = "guide.safetensors"
_FILE = "tuned.json"
# Fields of `Tuned` that are JSON values.
_PLAIN = ("num_images", "num_steps", "sampler", "range", "held_out", "baseline", "metric", "features")

Score = Annotated[float, Range(low=-1e100, high=1e100)]
_Level = Annotated[float, Range(low=0, high=1e9, special=True)]
_Steps = Annotated[int, Range(low=1, high=1e6)]
_Strength = Annotated[float, Range(low=-1e6, high=1e6)]


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What is tuned.

    Attributes:
        sigma_rel: EMA length.
        guide_images: Training images that the guide has seen, if it comes from the snapshots of a run.
        guide_sigma_rel: EMA length of the guide, if it comes from the snapshots of a run.
        guidance: Guidance weight; 1 for none.
        interval: Noise levels (low, high] at which guidance acts.
        guide: Model file or run that guides, if it is not an earlier point of the same run; `self` for the run's
            own network without labels.
        levels: Noise levels of a student's steps after the first; None: the standard ones.
        num_steps: Noise levels of the sampler; None for those of the plan.
        s_churn: Strength of the noise that the sampler heun adds.
    """

    sigma_rel: Width
    guide_images: Time | None = None
    guide_sigma_rel: Width | None = None
    guidance: _Strength = 1.0
    interval: tuple[_Level, _Level] = (0.0, math.inf)
    guide: str | None = None
    levels: tuple[_Level, ...] | None = None
    num_steps: _Steps | None = None
    s_churn: _Strength = 0.0

    @property
    def is_guided(self) -> bool:
        """Whether there is a guide."""
        return self.guide is not None or self.guide_images is not None

    @property
    def is_guided_by_itself(self) -> bool:
        """Whether the guide is the run's own network without labels."""
        return self.guide == str(SELF)

    def describe(self) -> str:
        """Return the settings in words."""
        text = f"EMA {self.sigma_rel:g}"
        if self.is_guided:
            named = "self without labels" if self.is_guided_by_itself else self.guide
            text += f", guide {named or f'of {self.guide_images:,.0f} images'}"
            if self.guide_sigma_rel is not None:
                text += f" with EMA {self.guide_sigma_rel:g}"
            text += f", weight {self.guidance:g}"
        if self.interval != (0.0, math.inf):
            text += f" for sigma in ({self.interval[0]:g}, {self.interval[1]:g}]"
        if self.levels is not None:
            text += f", noise levels {' '.join(f'{level:.3g}' for level in self.levels)}"
        if self.num_steps is not None:
            text += f", {self.num_steps} steps"
        if self.s_churn:
            text += f", churn {self.s_churn:g}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; an interval without an upper end has null there."""
        low, high = self.interval
        return {**dataclasses.asdict(self), "interval": [low, None if high == math.inf else high]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Knobs":
        """Read what `to_json` returned."""
        low, high = content["interval"]
        levels = content.get("levels")
        given = {
            "interval": (low, math.inf if high is None else high),
            "levels": levels and tuple(map(float, levels)),
        }
        return from_json(cls, {**content, **given})


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One evaluation of the search.

    Attributes:
        stage: What was being searched.
        knobs: The settings.
        score: Their score.
    """

    stage: str
    knobs: Knobs
    score: Annotated[float, Range(low=-1e100, high=1e100, special=True)]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search found.

    Attributes:
        best: The settings with the lowest score in the search.
        num_steps: Noise levels of the sampler.
        sampler: Name of the sampler.
        tried: All evaluations, in order.
        held_out: Scores of `best`, one per repeat, with seeds that the search never saw.
        baseline: Scores of EMA length 0.10 without guidance, with the same seeds.
        metric: What a score is, in words.
        features: What it is measured in, in words.
        num_images: Point of the run that was tuned, in training images; None if a file does not say it.
        range: Ends and exponent of the schedule (sigma_min, sigma_max, rho) where they were not the usual ones.
    """

    best: Knobs
    num_steps: _Steps
    sampler: str
    tried: list[Tried]
    held_out: list[Score]
    baseline: list[Score]
    metric: str = FRECHET
    features: str = OWN_CLASSIFIER
    num_images: Time | None = None
    range: dict[str, _Level] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        find_sampler(self.sampler)
        if not len(self.held_out) == len(self.baseline) > 0:
            raise ValueError("held_out and baseline must hold one score for each repeat")

    @property
    def judged(self) -> str:
        """What was measured, in words."""
        return judged(self.metric, self.features)

    @property
    def is_share(self) -> bool:
        """Whether improvements are shares of the baseline, which must be clearly positive for that.

        A Frechet distance is never negative. Another score, such as a kernel distance, is clearly positive where the
        95% confidence interval of its mean is; one repeat cannot tell.
        """
        if min(self.baseline) <= 0:
            return False
        error = half_interval(self.baseline)
        return self.metric == FRECHET or (error is not None and statistics.fmean(self.baseline) > error)

    @property
    def improvements(self) -> list[float]:
        """How much lower the held-out score is than the baseline's with the same seeds, one per repeat.

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

    @property
    def is_better(self) -> bool:
        """Whether the improvement lies above 0 with its 95% confidence interval."""
        error = self.improvement_error
        return error is not None and self.improvement > error


def judged(metric: str, features: str) -> str:
    """Name of a score and what it is measured in, as one phrase: distances have features, other scores have cases."""
    return f"{metric} {'in features of' if 'distance' in metric else 'on'} {features}"


def half_interval(values: list[float]) -> float | None:
    """Half the 95% confidence interval of the mean of independent values, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def save_tuned(run: str | Path, tuned: Tuned) -> Path:
    """Write what a search found and, if it is better than the comparison, the networks that it needs.

    Only better settings become the default of `edm2 sample RUN` and of `edm2.hub`.

    Args:
        run: Folder of the run.
        tuned: What `tune` returned.

    Returns:
        The folder, `tuning` in the run's, with tuned.json, model.safetensors and, with guidance, guide.safetensors.
        Files of an earlier search are replaced or removed.
    """
    folder, knobs = Path(run) / FOLDER, tuned.best
    networks = {}
    if tuned.is_better:
        networks[MODEL_FILE] = reconstruct_denoiser(run, knobs.sigma_rel, tuned.num_images)
    if tuned.is_better and knobs.is_guided:
        source = run if knobs.is_guided_by_itself else knobs.guide or run
        networks[GUIDE_FILE] = (
            load_model(source)
            if knobs.guide_sigma_rel is None
            else reconstruct_denoiser(source, knobs.guide_sigma_rel, knobs.guide_images)
        )
        if knobs.is_guided_by_itself:
            networks[GUIDE_FILE][1][IGNORES_LABELS] = True
    # Removed only now, because the guide may have been this file.
    for name in (MODEL_FILE, GUIDE_FILE):
        if name not in networks:
            (folder / name).unlink(missing_ok=True)
    for name, (denoiser, info) in networks.items():
        save_model(folder / name, denoiser.options, denoiser.state_dict(), info, overwrite=True)
    derived = ("is_better", "is_share", "improvements", "improvement", "improvement_error")
    content = {
        "knobs": knobs.to_json(),
        "tried": [{**vars(t), "knobs": t.knobs.to_json()} for t in tuned.tried],
        **{name: getattr(tuned, name) for name in (*_PLAIN, *derived)},
    }
    write_sealed(folder / _FILE, content)
    return folder


def read_tuned(run: str | Path) -> Tuned | None:
    """Read what `save_tuned` wrote for a run; None if the run was not tuned.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(run) / FOLDER / _FILE
    if not path.exists():
        return None
    try:
        content = read_sealed(path, finite=False)
        return from_json(Tuned, {
            "best": Knobs.from_json(content["knobs"]),
            "tried": [from_json(Tried, {**t, "knobs": Knobs.from_json(t["knobs"])}) for t in content["tried"]],
            **{name: content[name] for name in _PLAIN if name in content},
        })  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run `edm2 tune` again; it reuses its evaluations"
        ) from error


def tuned_settings(run: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what `edm2 sample` uses by default for a run.

    Args:
        run: Folder of a run.

    Returns:
        Values of its options, empty where the run was not tuned or nothing better was found; and remarks for the user.
    """
    found = read_tuned(run)
    if found is None:
        return {}, []
    if not found.is_better:
        return {}, [f"tuning found nothing better than EMA {BASELINE_SIGMA_REL:g} without guidance"]
    knobs = found.best
    remarks = [f"tuned settings: {knobs.describe()}; --ema chooses others"]
    newest = max(s.t for s in read_manifest(snapshots_of(run)).snapshots)
    if found.num_images is not None and found.num_images != newest:
        remarks.append(
            f"the settings were tuned after {found.num_images:,.0f} training images, and the newest snapshot, which is "
            f"sampled, comes after {newest:,.0f}: run `edm2 tune` again to tune that"
        )
    steps = knobs.num_steps or found.num_steps
    settings: dict[str, Any] = dict(
        num_steps=steps, sampler=found.sampler, ema=knobs.sigma_rel, **found.range
    )
    if knobs.s_churn:
        settings["s_churn"] = knobs.s_churn
    if knobs.levels is not None:
        settings["levels"] = knobs.levels
    if knobs.is_guided:
        settings |= {"guidance": knobs.guidance, "interval": knobs.interval}
    if knobs.guide is not None:
        settings["guide"] = run / FOLDER / GUIDE_FILE
    elif knobs.is_guided:
        settings |= {"guide_ema": knobs.guide_sigma_rel, "guide_images": knobs.guide_images}
    return settings, remarks
