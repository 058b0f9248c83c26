"""Scores of ensembles of fields: how close to what happened, and how honest about what is not known.

A forecast is `[cases, members, leads, channels, height, width]`, the truth the same without members. NaN marks a
missing value; a pixel counts where the truth and all members are known.

Ref: fair scores, Ferro, Q. J. R. Meteorol. Soc. 140 (2014); spread and skill, Fortin et al., J. Hydrometeorol. 15
(2014).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edm2.extras import need
from edm2.metrics.ranks import flatness, ranks_of
from edm2.metrics.spectrum import RadialSpectrum, radial_power

_CLIMATE_MEMBERS = 64
_BINS = 10  # of forecast probabilities


@dataclass(frozen=True)
class Estimate:
    """A number for each lead and channel, `[leads, channels]`, and its 95% interval from resampled cases."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Reliability:
    """How often a threshold was exceeded, against how often the ensemble said so.

    Attributes:
        threshold: `[channels]` in the data's units.
        quantile: Share of the truth below it, where it was chosen so; else None.
        forecast: `[leads, channels, bins]`, mean forecast probability of each bin; NaN where it is empty.
        observed: The same of the observed frequency.
        count: Pixels of each bin.
        brier: Brier score, `[leads, channels]`.
    """

    threshold: np.ndarray
    quantile: float | None
    forecast: np.ndarray
    observed: np.ndarray
    count: np.ndarray
    brier: np.ndarray


@dataclass(frozen=True)
class Baseline:
    """Scores of a simple forecast, and by what share the ensemble's fair CRPS is lower."""

    crps: Estimate
    rmse: Estimate
    skill: Estimate


@dataclass(frozen=True, kw_only=True)
class EnsembleScores:
    """What `score_ensemble` found; arrays are `[leads, channels]` where nothing else is said.

    Attributes:
        num_cases: Cases.
        num_members: Members.
        known: Share of the pixels that counted, `[leads, channels]`.
        crps_fair: Continuous ranked probability score, right on average for any number of members; that of a single
            member is not defined.
        crps: The same of the ensemble as it is, which falls as members are added.
        rmse: Root mean square error of the ensemble's mean.
        spread: Root mean variance of the ensemble.
        spread_skill: `sqrt((M + 1) / M) spread / rmse`: 1 for an honest ensemble, below 1 for one too sure of itself.
        ranks: Histogram of the truth's rank among the members, `[leads, channels, M + 1]`.
        ranks_p: Probability of a histogram as uneven as that from an honest ensemble.
        reliability: One for each threshold.
        spectrum: Power by wave number of members, their mean and the truth; None where values are missing.
        baselines: Persistence and climatology, where they were given.
    """

    num_cases: int
    num_members: int
    known: np.ndarray
    crps_fair: Estimate
    crps: Estimate
    rmse: Estimate
    spread: Estimate
    spread_skill: Estimate
    ranks: np.ndarray
    ranks_p: np.ndarray
    reliability: tuple[Reliability, ...]
    spectrum: RadialSpectrum | None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values; null for those that are not defined."""
        return {name: _plain(value) for name, value in vars(self).items()}


def score_ensemble(
    members: np.ndarray,
    truth: np.ndarray,
    *,
    start: np.ndarray | None = None,
    climate: np.ndarray | bool = True,
    thresholds: Sequence[float] = (),
    quantiles: Sequence[float] = (0.5, 0.9),
    resamples: int = 1000,
    seed: int = 0,
    on_case: Callable[[], None] | None = None,
) -> EnsembleScores:
    """Score ensembles against what happened.

    Args:
        members: `[N, M, T, C, H, W]`; each case is read once, so that the array may be mapped from a file.
        truth: `[N, T, C, H, W]`.
        start: `[N, C, H, W]` last known frame, for the reference "persistence".
        climate: `[K, C, H, W]` fields of other times, for the reference "climatology". True: the truth of the other
            cases, where there are at least two; False: none.
        thresholds: Values whose exceedance is judged, the same for all channels.
        quantiles: Further thresholds, as quantiles of each channel's truth.
        resamples: Draws of N cases with replacement, for the intervals.
        seed: Seed of these draws and of ranks between equal values.
        on_case: Called after each case.

    Returns:
        The scores.

    Raises:
        ValueError: If shapes do not fit, no pixel is known, or a value is infinite.
    """
    members, truth = np.asarray(members), np.asarray(truth)
    _check(members, truth, start)
    levels = _levels(truth, thresholds, quantiles)
    sums = _Sums(members.shape[1], truth.shape, len(levels))
    climates = _climates(truth, climate)
    rng = np.random.default_rng(seed)
    for i in range(len(truth)):
        case = _Case(np.asarray(members[i], np.float64), np.asarray(truth[i], np.float64), i)
        sums.add(i, case, levels, rng)
        if start is not None:
            sums.compare(i, "persistence", case, np.asarray(start[i], np.float64)[None, None])
        if climates is not None:
            sums.compare(i, "climatology", case, climates(i))
        if on_case is not None:
            on_case()
    if not sums.count.any():
        raise ValueError("no pixel is known both in the truth and in all members: there is nothing to score")
    return sums.scores(levels, resamples, np.random.default_rng(seed))


def _check(members: np.ndarray, truth: np.ndarray, start: np.ndarray | None) -> None:
    if members.ndim != 6 or truth.ndim != 5 or (members.shape[0], *members.shape[2:]) != truth.shape:
        raise ValueError(
            f"members of shape {list(members.shape)} and truth of shape {list(truth.shape)}: give [cases, members, "
            "leads, channels, height, width], and the same without members"
        )
    if 0 in members.shape:
        raise ValueError(f"members of shape {list(members.shape)} are empty: give at least one of each")
    wanted = (truth.shape[0], *truth.shape[2:])
    if start is not None and start.shape != wanted:
        raise ValueError(
            f"start frames of shape {list(start.shape)} must be {list(wanted)}, the last known frame of each case"
        )


def _levels(
    truth: np.ndarray, thresholds: Sequence[float], quantiles: Sequence[float]
) -> list[tuple[np.ndarray, float | None]]:
    """Each threshold by channel, with its quantile."""
    channels = np.moveaxis(truth, 2, 0).reshape(truth.shape[2], -1)
    for q in quantiles:
        if not 0 < q < 1:
            raise ValueError(f"quantile {q} must lie between 0 and 1")
    found: list[tuple[np.ndarray, float | None]] = [
        (np.full(len(channels), float(value)), None) for value in thresholds
    ]
    if np.isnan(channels).all(axis=1).any():
        return found  # whose scores are not defined either
    return found + [(np.nanquantile(channels, q, axis=1), q) for q in quantiles]


def _climates(truth: np.ndarray, climate: np.ndarray | bool) -> Callable[[int], np.ndarray] | None:
    """The climatological ensemble of each case, `[K, T or 1, C, H, W]`."""
    if isinstance(climate, np.ndarray):
        if climate.ndim != 4 or climate.shape[1:] != truth.shape[2:] or len(climate) < 2:
            raise ValueError(
                f"climate of shape {list(climate.shape)} must be [K, {', '.join(map(str, truth.shape[2:]))}] with at "
                "least two fields"
            )
        pick = np.linspace(0, len(climate) - 1, min(len(climate), _CLIMATE_MEMBERS)).astype(int)
        chosen = np.asarray(climate[pick], np.float64)[:, None]
        return lambda _: chosen
    if not climate or len(truth) < 3:
        return None

    def others(i: int) -> np.ndarray:
        rows = np.delete(np.arange(len(truth)), i)
        pick = rows[np.linspace(0, len(rows) - 1, min(len(rows), _CLIMATE_MEMBERS)).astype(int)]
        return np.asarray(truth[pick], np.float64)

    return others


class _Case:
    """One case's members `[M, T, C, H, W]` and truth, with missing values set to 0 and a mask of the known ones."""

    def __init__(self, members: np.ndarray, truth: np.ndarray, number: int) -> None:
        if np.isinf(members).any() or np.isinf(truth).any():
            raise ValueError(f"case {number} holds infinite values: mark what is missing with NaN")
        self.mask = ~(np.isnan(truth) | np.isnan(members).any(axis=0))
        self.is_whole = bool(self.mask.all())
        self.members = np.sort(np.where(self.mask, members, 0.0), axis=0)
        self.unsorted = members
        self.truth = np.where(self.mask, truth, 0.0)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of known pixels, `[T, C]`."""
        total: np.ndarray = np.where(self.mask, values, 0.0).sum(axis=(-2, -1))
        return total

    def crps(self, members: np.ndarray, *, fair: bool) -> np.ndarray:
        """CRPS of sorted members at each pixel."""
        rules = need("scoringrules", "scores of ensembles")
        # "pwm" is the fair estimator computed by sorting, "qd" that of the ensemble as it is.
        score: np.ndarray = rules.crps_ensemble(
            self.truth,
            members,
            m_axis=0,
            estimator="pwm" if fair else "qd",
            sorted_ensemble=True,
            backend="numpy",
        )
        return score


class _Sums:
    """Sums over the pixels of each case, from which any set of cases can be scored."""

    def __init__(self, num_members: int, shape: tuple[int, ...], num_levels: int) -> None:
        cases, leads, channels = shape[:3]
        self.num_members, self._pixels = num_members, shape[3] * shape[4]
        self.count = np.zeros((cases, leads, channels))
        self._by_case = {name: np.zeros_like(self.count) for name in ("fair", "plain", "square", "variance")}
        self.ranks = np.zeros((*self.count.shape, num_members + 1))
        # Forecast probability, observed frequency, count in each bin, and squared difference.
        self._reliability = np.zeros((num_levels, 3, leads, channels, _BINS))
        self._brier = np.zeros((num_levels, leads, channels))
        self._spectra: list[RadialSpectrum] = []
        self._references: dict[str, dict[str, np.ndarray]] = {}

    def add(
        self, i: int, case: _Case, levels: list[tuple[np.ndarray, float | None]], rng: np.random.Generator
    ) -> None:
        m, mean = self.num_members, case.members.mean(axis=0)
        values = {
            "plain": case.crps(case.members, fair=False),
            "fair": case.crps(case.members, fair=True) if m > 1 else np.full(mean.shape, np.nan),
            "square": (mean - case.truth) ** 2,
            "variance": case.members.var(axis=0, ddof=1) if m > 1 else np.zeros(mean.shape),
        }
        self.count[i] = case.mask.sum(axis=(-2, -1))
        for name, value in values.items():
            self._by_case[name][i] = case.total(value)
        self.ranks[i] = ranks_of(case.members, case.truth, case.mask, rng)
        for j, (threshold, _) in enumerate(levels):
            self._exceed(j, case, threshold[:, None, None])
        if case.is_whole:
            self._spectra.append(radial_power(case.unsorted, case.truth))

    def _exceed(self, j: int, case: _Case, threshold: np.ndarray) -> None:
        probability, happened = (case.members > threshold).mean(axis=0), case.truth > threshold
        self._brier[j] += case.total((probability - happened) ** 2)
        bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
        for b in np.unique(bins):
            here = case.mask & (bins == b)
            for k, value in enumerate((probability, happened, 1.0)):
                self._reliability[j, k, ..., b] += np.where(here, value, 0.0).sum(axis=(-2, -1))

    def compare(self, i: int, name: str, case: _Case, other: np.ndarray) -> None:
        """Add a simple forecast, `[K, T or 1, C, H, W]`; where it does not know a pixel, that is not compared."""
        kept = self._references.setdefault(
            name, {key: np.zeros_like(self.count) for key in ("count", "score", "square", "fair")}
        )
        known = case.mask & ~np.isnan(other).any(axis=0)
        given = np.broadcast_to(np.nan_to_num(other), (len(other), *case.mask.shape))
        score = case.crps(np.sort(given, axis=0), fair=len(given) > 1)
        own = case.crps(case.members, fair=self.num_members > 1)
        square = (given.mean(axis=0) - case.truth) ** 2
        for key, value in (("count", known), ("score", score), ("square", square), ("fair", own)):
            kept[key][i] = np.where(known, value, 0.0).sum(axis=(-2, -1))

    def scores(
        self, levels: list[tuple[np.ndarray, float | None]], resamples: int, rng: np.random.Generator
    ) -> EnsembleScores:
        cases, m, sums = len(self.count), self.num_members, self._by_case
        weights = rng.multinomial(cases, [1 / cases] * cases, size=resamples).astype(np.float64)

        def estimate(function: Callable[..., Any], *of: np.ndarray) -> Estimate:
            with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where nothing is defined, neither is an interval
                value = function(*(a.sum(axis=0) for a in of))
                drawn = function(*(np.tensordot(weights, a, axes=1) for a in of))
                low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0) if resamples else (value, value)
            return Estimate(value, low, high)

        baselines = {
            name: Baseline(
                crps=estimate(_ratio, kept["score"], kept["count"]),
                rmse=estimate(_root, kept["square"], kept["count"]),
                skill=estimate(_skill, kept["fair"], kept["score"]),
            )
            for name, kept in self._references.items()
        }
        total = self.count.sum(axis=0)
        return EnsembleScores(
            num_cases=cases,
            num_members=m,
            known=total / (cases * self._pixels),
            crps_fair=estimate(_ratio, sums["fair"], self.count),
            crps=estimate(_ratio, sums["plain"], self.count),
            rmse=estimate(_root, sums["square"], self.count),
            spread=estimate(_root, sums["variance"], self.count),
            spread_skill=estimate(_root, (m + 1) / m * sums["variance"], sums["square"]),
            ranks=self.ranks.sum(axis=0).astype(np.int64),
            ranks_p=flatness(self.ranks),
            reliability=tuple(self._reliable(j, *level) for j, level in enumerate(levels)),
            spectrum=RadialSpectrum.mean_of(self._spectra) if self._spectra else None,
            baselines=baselines,
        )

    def _reliable(self, j: int, threshold: np.ndarray, quantile: float | None) -> Reliability:
        forecast, observed, count = self._reliability[j]
        with np.errstate(invalid="ignore", divide="ignore"):
            return Reliability(
                threshold=threshold,
                quantile=quantile,
                forecast=forecast / count,
                observed=observed / count,
                count=count.astype(np.int64),
                brier=self._brier[j] / self.count.sum(axis=0),
            )


def _ratio(a: np.ndarray, b: np.ndarray) -> Any:
    return a / b


def _root(a: np.ndarray, b: np.ndarray) -> Any:
    return np.sqrt(a / b)


def _skill(ours: np.ndarray, theirs: np.ndarray) -> Any:
    return 1 - ours / theirs


def _plain(value: Any) -> Any:
    """JSON values, with None for what is not finite."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(v) for key, v in vars(value).items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
