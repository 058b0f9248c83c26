"""Images and scores of settings, each evaluated once, at one moment of a run."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from edm2.ema import reconstruct_many
from edm2.ema.storage.manifest import read_manifest
from edm2.generate import ImageGenerator, SamplerOptions, snapshots_of
from edm2.generate.checks import check_guide
from edm2.tuning.evaluations import Evaluations
from edm2.tuning.plan import SELF, TuningPlan, has_snapshots
from edm2.tuning.result import BASELINE_SIGMA_REL, Knobs

# What a network is made from: run or model file, EMA length, moment.
_Network = tuple[Path, float | None, float | None]


class Score(Protocol):
    """A number about images, lower being better.

    Attributes:
        fingerprint: Identifies what is measured.
        metric: What it is, in words, such as "Frechet distance".
        features: What it is measured in, in words.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102 - described above
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def features(self) -> str: ...  # noqa: D102

    def distance(self, images: np.ndarray) -> float:
        """Score images, `[N, C, H, W]` uint8."""


@runtime_checkable
class CaseScore(Protocol):
    """A number about what a model makes of given cases, lower being better; attributes as in `Score`."""

    @property
    def fingerprint(self) -> str: ...  # noqa: D102 - described in `Score`
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def features(self) -> str: ...  # noqa: D102

    def score_cases(self, make: Callable[..., np.ndarray], seeds: range) -> float:
        """Score what `make(seeds, labels, conditions=..., vectors=...)` gives; `seeds` chooses cases and noise."""


class Bench:
    """Makes images by knobs, scores them, and remembers the scores in the run's folder.

    The moment is fixed when the bench is opened: snapshots that training adds later are not read.

    Args:
        run: Folder of a training run.
        score: What to measure.
        plan: Moment, guide and sampler.
        device: Where to make images.

    Attributes:
        moments: Times of the snapshots, ascending; the last is the moment that is tuned.
        guide_moment: Moment of the plan's guide, where that is a run.

    Raises:
        ValueError: If the run has no snapshot up to the wanted moment, or the plan's guide does not fit.
    """

    def __init__(
        self, run: Path, score: Score | CaseScore, plan: TuningPlan, device: torch.device | str
    ) -> None:
        self._run, self._score, self._device = run, score, device
        self._options: dict[str, Any] = {"num_steps": plan.num_steps, "sampler": plan.sampler, **plan.range}
        self._run_id = read_manifest(snapshots_of(run)).run.run_id
        self.moments = moments(run, plan.num_images)
        self.guide_moment, guide = None, None
        if plan.guide is not None:
            guide = open_guide(run, plan.guide).identity()
            if plan.guide == SELF:
                self.guide_moment = self.moments[-1]
            elif has_snapshots(plan.guide):
                self.guide_moment = moments(plan.guide)[-1]
        self._guide_identity = json.dumps(guide, sort_keys=True)
        self._evaluations = Evaluations(run)
        self._generators: dict[_Network, ImageGenerator] = {}
        self._refusals: dict[_Network, str] = {}

    def refusal(self, knobs: Knobs) -> str:
        """Say why the snapshots cannot give one of the networks; empty where they can."""
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
        networks: list[_Network] = [(self._run, knobs.sigma_rel, self.moments[-1])]
        if knobs.is_guided:
            own = knobs.guide is None or knobs.is_guided_by_itself
            source = self._run if own else Path(knobs.guide or "")
            networks.append((source, knobs.guide_sigma_rel, knobs.guide_images))
        return networks

    def effect(self, knobs: Knobs) -> tuple[object, ...]:
        """Return what the images depend on; equal for knobs that give the same images."""
        low, high = knobs.interval
        options = SamplerOptions(**{**self._options, "num_steps": self._steps(knobs)})
        all_levels: list[float] = options.sigmas()[:-1].tolist()
        levels = tuple(level for level in all_levels if low < level <= high)
        model, *guide = self._networks(knobs)
        sampler = (self._steps(knobs), knobs.s_churn)
        same = guide == [model] and not knobs.is_guided_by_itself
        if not guide or same or knobs.guidance == 1 or not levels:
            return (knobs.sigma_rel, knobs.levels, sampler)
        return (model, *guide, knobs.is_guided_by_itself, knobs.guidance, levels, sampler)

    def _steps(self, knobs: Knobs) -> int:
        return knobs.num_steps or int(self._options["num_steps"])

    def evaluate(self, knobs: Knobs, seeds: range) -> float:
        """Score the images of some seeds, unless that was done before.

        Raises:
            FloatingPointError: If the images are not finite.
        """
        facts = [
            self._run_id,
            self.moments[-1],
            self._score.fingerprint,
            self._options,
            seeds.start,
            len(seeds),
        ]
        settings = dataclasses.asdict(knobs)
        # A guide is known by its content, not by its path.
        if settings.pop("guide") is not None:
            settings["guide"] = self._guide_identity
        # Evaluations that were made before there were these knobs are still good.
        for name in ("levels", "num_steps", "s_churn"):
            if not settings[name]:
                del settings[name]
        return self._evaluations.score(
            [facts, settings],
            lambda: self._score_of(knobs, seeds),
            num_images=self.moments[-1],
            knobs=knobs.describe(),
            seed=seeds.start,
        )

    def _score_of(self, knobs: Knobs, seeds: range) -> float:
        if isinstance(self._score, CaseScore):
            return self._score.score_cases(partial(self.images, knobs), seeds)
        return self._score.distance(self.images(knobs, seeds))

    def images(self, knobs: Knobs, seeds: Sequence[int], *given: Any, **more: Any) -> np.ndarray:
        """Make the images of some seeds; further arguments as of `ImageGenerator.images`."""
        options = {**self._options, **more, "num_steps": self._steps(knobs)}
        if knobs.s_churn:
            options["s_churn"] = knobs.s_churn
        model, *guides = [self._generator(network) for network in self._networks(knobs)]
        if knobs.is_guided_by_itself:
            guides = [guide.without_labels() for guide in guides]
        if knobs.levels is not None:
            options["levels"] = knobs.levels
        if guides:
            options |= {"guide": guides[0], "guidance": knobs.guidance, "interval": knobs.interval}
        return model.images(seeds, *given, **options)

    def _generator(self, network: _Network) -> ImageGenerator:
        source, sigma_rel, num_images = network
        found = self._generators.pop(network, None)
        found = found or ImageGenerator.load(source, sigma_rel, num_images=num_images, device=self._device)
        # An evaluation needs two networks at most: a large model must not fill the memory.
        while len(self._generators) >= 2:
            self._generators.pop(next(iter(self._generators)))
        self._generators[network] = found  # at the end, as the one used last
        return found


def open_guide(run: str | Path, guide: Path) -> ImageGenerator:
    """Open the guide that a plan names.

    Returns:
        The guide; of a run, with the EMA length of the comparison.

    Raises:
        ValueError: If it does not fit the run, or as in `ImageGenerator.load`.
    """
    model = ImageGenerator.load(run, BASELINE_SIGMA_REL)
    if guide == SELF:
        return model.without_labels()
    opened = ImageGenerator.load(guide, BASELINE_SIGMA_REL if has_snapshots(guide) else None)
    check_guide(model, opened)
    return opened


def moments(run: Path, until: float | None = None) -> list[float]:
    """Return the times of a run's snapshots, ascending.

    Args:
        run: Folder of a run.
        until: Leave out later ones.

    Raises:
        ValueError: If there are none.
    """
    times = sorted({s.t for s in read_manifest(snapshots_of(run)).snapshots})
    found = [t for t in times if until is None or t <= until]
    if times and not found:
        raise ValueError(
            f"num_images {until:g} is before the first snapshot of {run}, at {times[0]:,.0f}: give at least that"
        )
    if not found:
        raise ValueError(f"{run} has no snapshot: train on until the first is written")
    return found
