"""Scores of ensembles on held-out cases, as something to tune."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from edm2.data import ImageDataset
from edm2.generate.members import member_seeds
from edm2.metrics.ensemble import score_ensemble
from edm2.tuning.plan import HELD_OUT_SEED, SEARCH_SEED, TuningPlan

EnsembleMetric = Literal["crps", "spread-skill"]
_NAMES = {"crps": "fair CRPS", "spread-skill": "spread / skill, its departure from 1,"}


class EnsembleJudge:
    """Scores what a model makes of held-out pairs, as an ensemble for each condition.

    Half of the cases serve the search. The others are shared by the final measurements, so that these know neither the
    noise nor the cases that the settings were chosen with.

    Args:
        dataset: Pairs that the run was not trained on.
        plan: How many images each choice and each final measurement make: `members` for each case.
        metric: crps: fair CRPS in units of each channel's standard deviation. spread-skill: |ln| of the ratio of spread
            and error, which is 0 for an honest ensemble.
        members: Members of each case, at least 2.

    Attributes:
        fingerprint: Identifies the cases and how they are scored.
        metric: Name of the metric, in words.
        features: The cases, in words.

    Raises:
        ValueError: If the data has no conditions, or there are too few cases or members.
    """

    def __init__(
        self, dataset: ImageDataset, plan: TuningPlan, *, metric: EnsembleMetric = "crps", members: int = 16
    ) -> None:
        if dataset.conditions is None:
            raise ValueError(
                f"{dataset.name!r} has no conditions, which an ensemble is made for: give held-out pairs, or choose "
                "another --metric"
            )
        if members < 2:
            raise ValueError(f"members {members} must be at least 2: one has no spread")
        self._dataset, self._members, self._kind = dataset, members, metric
        rows = np.random.default_rng(0).permutation(len(dataset))
        half = len(rows) // 2
        self._search = rows[:half][: plan.samples // members]
        self._final = [
            part[: plan.final_samples // members] for part in np.array_split(rows[half:], plan.repeats)
        ]
        fewest = min(map(len, (self._search, *self._final)))
        if fewest < 2:
            raise ValueError(
                f"{len(dataset)} held-out cases of {members} members, {plan.samples} images for each choice and "
                f"{plan.final_samples} for each of {plan.repeats} final measurements: too few for two cases each; give "
                "more cases or images, or fewer members"
            )
        text = json.dumps(
            [dataset.fingerprint, metric, members, plan.samples, plan.final_samples, plan.repeats]
        )
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.metric = _NAMES[metric]
        self.features = f"held-out cases ({len(self._search)} in the search) with {members} members each"

    def score_cases(self, make: Callable[..., np.ndarray], seeds: range) -> float:
        """Score an ensemble; see `edm2.tuning.bench.CaseScore`."""
        rows = self._search
        if seeds.start != SEARCH_SEED:
            rows = self._final[(seeds.start - HELD_OUT_SEED) // len(seeds)]
        cases, members = rows.repeat(self._members), np.tile(np.arange(self._members), len(rows))
        made = make(
            member_seeds(cases, members, seed=seeds.start), *self._labels(cases), **self._given(cases)
        )
        truth = np.asarray(self._dataset.images(rows), np.float64)
        # Without a unit, so that channels of any units weigh alike.
        scale = np.nanstd(truth, axis=(0, 2, 3))[:, None, None]
        scale = np.where(scale > 0, scale, 1.0)
        found = score_ensemble(
            made.reshape(len(rows), self._members, 1, *made.shape[1:]) / scale,
            (truth / scale)[:, None],
            climate=False,
            quantiles=(),
            resamples=0,
        )
        if self._kind == "crps":
            return float(np.nanmean(found.crps_fair.value))
        return float(np.nanmean(np.abs(np.log(found.spread_skill.value))))

    def _given(self, rows: np.ndarray) -> dict[str, Any]:
        assert self._dataset.conditions is not None
        given: dict[str, Any] = {"conditions": self._dataset.conditions.images(rows)}
        if self._dataset.vector_dim:
            given["vectors"] = self._dataset.vectors(rows)
        return given

    def _labels(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return (self._dataset.labels(rows),) if self._dataset.num_classes else ()
