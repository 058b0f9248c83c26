"""Scores of ensembles against closed forms of Gaussian ensembles."""

import json
import math
from typing import Any

import numpy as np
import pytest

from edm2.metrics.ensemble import EnsembleScores, score_ensemble
from edm2.metrics.ranks import flatness

SHAPE = (2, 2, 6, 8)  # leads, channels, height, width


def gaussian(
    cases: int = 60, members: int = 8, spread: float = 1.0, error: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Members and truth around a common mean that is different in each pixel; the spread and a bias are wrong."""
    rng = np.random.default_rng(seed)
    mean = 10 * rng.standard_normal((cases, 1, *SHAPE))
    return (
        mean + error + spread * rng.standard_normal((cases, members, *SHAPE)),
        (mean + rng.standard_normal((cases, 1, *SHAPE)))[:, 0],
    )


def fair_crps(spread: float, error: float) -> float:
    """E|X - y| - E|X - X'| / 2 for X ~ N(error, spread^2), y ~ N(0, 1)."""
    scale = math.sqrt(1 + spread**2)
    z = error / scale
    absolute = scale * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + error * math.erf(z / math.sqrt(2))
    return absolute - spread / math.sqrt(math.pi)


@pytest.mark.parametrize(("spread", "error"), [(1.0, 0.0), (0.5, 0.0), (1.5, 0.7)])
@pytest.mark.parametrize("members", [2, 8])
def test_crps_and_spread_skill_of_gaussians(spread: float, error: float, members: int) -> None:
    found = score_ensemble(*gaussian(spread=spread, error=error, members=members), climate=False)
    want = fair_crps(spread, error)
    assert found.crps_fair.value == pytest.approx(want, rel=0.06)
    # The plain score counts each member's distance to itself.
    assert found.crps.value == pytest.approx(want + spread / math.sqrt(math.pi) / members, rel=0.06)
    rmse = math.sqrt(1 + error**2 + spread**2 / members)
    assert found.rmse.value == pytest.approx(rmse, rel=0.05)
    assert found.spread.value == pytest.approx(spread, rel=0.05)
    assert found.spread_skill.value == pytest.approx(
        math.sqrt((members + 1) / members) * spread / rmse, rel=0.05
    )
    assert (found.crps_fair.low < found.crps_fair.value).all()
    assert (found.crps_fair.value < found.crps_fair.high).all()


def test_fair_crps_of_any_number_of_members_agrees_and_the_plain_one_does_not() -> None:
    few, many = (score_ensemble(*gaussian(cases=200, members=m), climate=False) for m in (2, 16))
    assert few.crps_fair.value.mean() == pytest.approx(many.crps_fair.value.mean(), rel=0.02)
    assert few.crps.value.mean() > 1.3 * many.crps.value.mean()


def test_fair_crps_is_that_of_pairs() -> None:
    members, truth = gaussian(cases=3)
    found = score_ensemble(members, truth, climate=False)
    pairs = np.abs(members[:, :, None] - members[:, None]).sum((1, 2)) / (8 * 7)
    want = np.abs(members - truth[:, None]).mean(1) - pairs / 2
    np.testing.assert_allclose(found.crps_fair.value, want.mean((0, -2, -1)), rtol=1e-12)


def test_intervals_cover_the_expectation() -> None:
    hits = 0
    for seed in range(40):
        members, truth = (x[..., :1, :3, :4] for x in gaussian(cases=30, members=4, seed=seed))
        found = score_ensemble(members, truth, climate=False, resamples=200)
        want = fair_crps(1, 0)
        hits += int((found.crps_fair.low[0, 0] <= want) & (want <= found.crps_fair.high[0, 0]))
    assert 33 <= hits <= 40  # 38 expected of 95%


def test_ranks_are_flat_for_honest_ensembles_only() -> None:
    honest, sure, shifted = (
        score_ensemble(*gaussian(spread=s, error=e, cases=100), climate=False)
        for s, e in ((1, 0), (0.7, 0), (1, 0.3))
    )
    assert honest.ranks.sum() == 100 * np.prod(SHAPE)
    assert (honest.ranks_p > 0.001).all()
    assert (sure.ranks_p < 1e-6).all()
    assert (shifted.ranks_p < 1e-6).all()
    ends = sure.ranks[..., [0, -1]].sum(-1) / sure.ranks.sum(-1)
    assert (ends > 2.5 / 9).all()  # outliers
    assert (shifted.ranks[..., 0] > shifted.ranks[..., -1]).all()


def test_flatness_is_right_for_pixels_that_are_alike() -> None:
    """Honest ensembles whose pixels repeat each other pass at the rate that the p value promises."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        # Fields of four independent pixels, each repeated 25 times.
        ranks = rng.integers(0, 9, (60, 4)).repeat(25, axis=1)
        p.append(flatness(np.stack([np.bincount(row, minlength=9) for row in ranks]).astype(float)))
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_ranks_of_equal_values_are_drawn() -> None:
    members = np.zeros((50, 4, 1, 1, 6, 6))
    found = score_ensemble(members, members[:, 0], climate=False)
    share = found.ranks[0, 0] / found.ranks.sum()
    assert share == pytest.approx(0.2, abs=0.03)


def test_reliability_and_brier() -> None:
    # Near the threshold, so that the ensembles have something to say; many members, so that they say it exactly.
    rng = np.random.default_rng(1)
    mean = 2 * rng.standard_normal((300, 1, 1, 1, 6, 8))
    members = mean + rng.standard_normal((300, 100, 1, 1, 6, 8))
    truth = (mean + rng.standard_normal(mean.shape))[:, 0]
    found = score_ensemble(members, truth, climate=False, thresholds=[0.0], resamples=0)
    (given, half, high) = found.reliability
    assert (given.quantile, half.quantile, high.quantile) == (None, 0.5, 0.9)
    full = given.count > 500
    assert np.abs(given.forecast - given.observed)[full].max() < 0.06
    assert full.sum() == 10
    assert (given.count.sum(-1) == 300 * 48).all()
    # Honest: the Brier score is below that of always saying one half.
    assert (given.brier < 0.25).all()
    sharp = score_ensemble(members, truth, climate=False, thresholds=[1e9]).reliability[0]
    assert (sharp.brier == 0).all()
    assert np.isnan(sharp.forecast[..., 1:]).all()


def test_baselines() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((80, *SHAPE))
    start = rng.standard_normal((80, *SHAPE[1:]))
    members = truth[:, None] + 0.1 * rng.standard_normal((80, 6, *SHAPE))
    found = score_ensemble(members, truth, start=start)
    # The difference of two unit normals, and a normal in its own law.
    assert found.baselines["persistence"].crps.value == pytest.approx(2 / math.sqrt(math.pi), rel=0.05)
    assert found.baselines["persistence"].rmse.value == pytest.approx(math.sqrt(2), rel=0.05)
    assert found.baselines["climatology"].crps.value == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    skill = found.baselines["persistence"].skill
    assert skill.value == pytest.approx(1 - found.crps_fair.value / found.baselines["persistence"].crps.value)
    assert (skill.low < skill.value).all()
    other = score_ensemble(members, truth, climate=rng.standard_normal((100, *SHAPE[1:])))
    assert other.baselines["climatology"].crps.value == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    assert "persistence" not in other.baselines


def test_missing_values_are_left_out() -> None:
    members, truth = gaussian(cases=20)
    whole = score_ensemble(members[..., :4], truth[..., :4], climate=False)
    truth[..., 4:6] = np.nan
    members[:, 3, ..., 6:] = np.nan
    found = score_ensemble(members, truth, climate=False, start=np.where(np.isnan(truth[:, 0]), np.nan, 0.0))
    np.testing.assert_allclose(found.crps_fair.value, whole.crps_fair.value)
    np.testing.assert_allclose(found.spread_skill.value, whole.spread_skill.value)
    np.testing.assert_array_equal(found.ranks, whole.ranks)
    assert found.known == pytest.approx(0.5)
    assert found.spectrum is None
    assert np.isfinite(found.baselines["persistence"].crps.value).all()


def test_one_member_has_an_error_and_no_spread() -> None:
    members, truth = gaussian(members=1)
    found = score_ensemble(members, truth, climate=False)
    np.testing.assert_allclose(found.crps.value, np.abs(members[:, 0] - truth).mean((0, -2, -1)))
    assert np.isnan(found.crps_fair.value).all()
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["crps_fair"]["value"][0][0] is None
    assert written["crps"]["value"][0][0] == found.crps.value[0, 0]


def test_spectrum_of_one_wave_and_of_white_noise() -> None:
    x = np.arange(16) * 2 * np.pi / 16
    wave = np.broadcast_to(np.sqrt(2) * np.cos(3 * x), (4, 3, 1, 1, 16, 16)).copy()
    spectrum = score_ensemble(wave, wave[:, 0], climate=False).spectrum
    assert spectrum is not None
    assert spectrum.wave.tolist() == list(range(1, 9))
    want = (spectrum.wave == 3).astype(float)  # a variance of 1, all in one wave
    for power in (spectrum.members, spectrum.mean, spectrum.truth):
        np.testing.assert_allclose(power[0, 0], want, atol=1e-12)
    noise = np.random.default_rng(0).standard_normal((50, 4, 1, 1, 16, 16))
    spectrum = score_ensemble(noise, noise[:, 0], climate=False).spectrum
    assert spectrum is not None
    assert spectrum.mean[0, 0] == pytest.approx(spectrum.members[0, 0] / 4, rel=0.1)


def test_the_draws_are_functions_of_the_seed() -> None:
    once, again, other = (score_ensemble(*gaussian(cases=10), seed=s) for s in (0, 0, 1))
    assert once.crps.low.tobytes() == again.crps.low.tobytes() != other.crps.low.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: dict(members=m[:, 0]), r"members of shape \[4, 2, 2, 6, 8\] and truth of shape .*: give"),
        (lambda m, t: dict(members=m[:, :0]), "are empty: give at least one of each"),
        (lambda m, t: dict(truth=t * np.inf), "case 0 holds infinite values: mark what is missing with NaN"),
        (lambda m, t: dict(truth=t * np.nan), "no pixel is known both in the truth and in all members"),
        (lambda m, t: dict(start=t), r"start frames of shape .* must be \[4, 2, 6, 8\]"),
        (lambda m, t: dict(climate=t), r"climate of shape .* must be \[K, 2, 6, 8\]"),
        (lambda m, t: dict(quantiles=[1.0]), "quantile 1.0 must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_bad_input(change: Any, message: str) -> None:
    members, truth = gaussian(cases=4)
    given = {"members": members, "truth": truth, **change(members, truth)}
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        score_ensemble(**given)


def test_few_cases_have_no_test_of_ranks() -> None:
    found: EnsembleScores = score_ensemble(*gaussian(cases=2))
    assert np.isnan(found.ranks_p).all()
    assert "climatology" not in found.baselines
