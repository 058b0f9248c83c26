"""Plans: figures of the issue, closed forms, budgets, and what is refused."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ellipj, ellipk
from torch import nn

import edm2.ema
from edm2.ema import PLANS, PowerEMA, sigma_rel_to_gamma
from edm2.ema.maths.motion import WHITE, Grid
from edm2.ema.maths.planning import best_widths, minimise
from edm2.ema.maths.plans import best_errors, spread
from edm2.ema.maths.solve import solve_motion
from edm2.ema.maths.targets import PowerProfile

RANGE = (0.03, 0.25)


def even(count: int) -> tuple[float, ...]:
    return tuple(np.arange(1, count + 1) / count)


@pytest.mark.parametrize(
    ("sigma_rels", "times", "error", "amplification"),
    [
        ((0.05, 0.1), even(256), 0.0027, 6.5),
        ((0.05, 0.1), even(64), 0.015, 6.0),
        ((0.05, 0.1), even(16), 0.079, 4.2),
        ((0.023, 0.044, 0.063, 0.122, 0.196, 0.244), (1.0,), 0.0070, 1.75),
        ((0.033, 0.052, 0.142, 0.244), even(4), 0.0046, 1.8),
    ],
)
def test_errors_of_known_arrangements(
    sigma_rels: tuple[float, ...], times: tuple[float, ...], error: float, amplification: float
) -> None:
    errors, norms = best_errors(times, sigma_rels, 1.0, spread(RANGE, 121), "fp32")
    assert errors.max() == pytest.approx(error, rel=0.03)
    assert norms.max() == pytest.approx(amplification, rel=0.03)


@pytest.mark.parametrize("name", ["compact", "small", "lean"])
def test_errors_agree_with_the_solver_that_reconstructs(name: str) -> None:
    plan = PLANS[name]
    stored = [PowerProfile(t, sigma_rel_to_gamma(s)) for t in plan.times for s in plan.sigma_rels]
    widths = spread(RANGE, 9)
    targets = [PowerProfile(1.0, sigma_rel_to_gamma(s)) for s in widths]
    solutions = solve_motion(Grid([*stored, *targets]), stored, np.full(len(stored), 1e-7), targets, WHITE)
    np.testing.assert_allclose(
        plan.errors(widths), [s.profile_misfit for s in solutions], rtol=0.02, atol=1e-6
    )


def test_named_plans_are_what_the_planner_finds() -> None:
    assert PLANS["compact"].sigma_rels == edm2.ema.plan().sigma_rels
    assert PLANS["small"].sigma_rels == edm2.ema.plan(tracks=6).sigma_rels
    lean = edm2.ema.plan(tracks=4, times=4)
    np.testing.assert_allclose(PLANS["lean"].sigma_rels, lean.sigma_rels, atol=5e-4)
    np.testing.assert_allclose(PLANS["lean"].times, lean.times, atol=5e-3)
    assert PLANS["paper"].worst_error() == pytest.approx(0.0027, rel=0.01)
    assert PLANS["compact"].worst_error() < 0.00041
    assert PLANS["small"].worst_error() < 0.0034
    assert PLANS["lean"].worst_error() < 0.0024


def test_a_thirty_second_of_the_papers_bytes_is_no_worse() -> None:
    paper = PLANS["paper"]
    for name in ("compact", "lean"):
        assert PLANS[name].storage_bytes(1000) * 32 <= paper.storage_bytes(1000)
        assert PLANS[name].worst_error() < paper.worst_error()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_best_widths_are_zolotarevs_points(count: int) -> None:
    a, b = (sigma_rel_to_gamma(s) + 0.5 for s in (0.25, 0.03))
    m = 1 - (a / b) ** 2
    _, _, dn, _ = ellipj((2 * np.arange(count) + 1) / (2 * count) * ellipk(m), m)
    points = sigma_rel_to_gamma(np.array(best_widths(0.03, 0.25, count))) + 0.5
    np.testing.assert_allclose(points, b * dn, rtol=1e-10)
    h = np.geomspace(a, b, 20_001)
    distance = np.abs((h[:, None] - points) / (h[:, None] + points)).prod(axis=1)
    # The best approximation in the worst case has equal errors at both ends and between all points.
    edges = [a, *sorted(points), b]
    gaps = [distance[(h >= lo) & (h <= hi)].max() for lo, hi in pairwise(edges)]
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-3)


def test_no_small_change_of_the_widths_is_better() -> None:
    best = np.array(best_widths(*RANGE, 6))
    widths = spread(RANGE, 400)
    least = best_errors([1.0], best.tolist(), 1.0, widths, "fp32")[0].max()
    for i in range(6):
        for factor in (0.97, 1.03):
            moved = best * np.where(np.arange(6) == i, factor, 1.0)
            assert best_errors([1.0], moved.tolist(), 1.0, widths, "fp32")[0].max() > 1.01 * least


def test_budgets_decide_tracks_and_times() -> None:
    budget = edm2.ema.plan(num_params=1000, memory_bytes=3 * 4000, storage_bytes=7 * 2000, dtype="bf16")
    assert (len(budget.sigma_rels), len(budget.times), budget.dtype) == (3, 2, "bf16")
    assert budget.memory_bytes(1000) == budget.memory_bytes(1000, updates=1024) == 14_000
    assert budget.memory_bytes(1000, updates=1025) == 18_000
    assert [PLANS[x].memory_bytes(1000) for x in ("paper", "lean")] == [18_000, 18_000]
    assert budget.storage_bytes(1000) == 12_000
    assert len(edm2.ema.plan(num_params=10, storage_bytes=120).sigma_rels) == 3
    middle = edm2.ema.plan(mid_run=True)
    assert len(middle.times) == 8
    assert max(middle.worst_error(at=t) for t in middle.times) < 0.00041


def test_history_and_more_tracks_help_and_rounding_hurts() -> None:
    one, more, history = (edm2.ema.plan(tracks=n, times=k) for n, k in ((3, 1), (5, 1), (3, 3)))
    assert history.worst_error() < 0.2 * one.worst_error()
    assert more.worst_error() < 0.2 * one.worst_error()
    fp32, fp16, bf16 = (edm2.ema.plan(dtype=d).worst_error() for d in ("fp32", "fp16", "bf16"))
    assert fp32 < 0.2 * fp16 < 0.2 * bf16
    assert edm2.ema.plan(tracks=5) is edm2.ema.plan((0.03, 0.25), tracks=5)


def test_tracker_takes_a_plan(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    assert PowerEMA(model).sigma_rels == (0.05, 0.1)
    assert PowerEMA(model, plan="compact").sigma_rels == PLANS["compact"].sigma_rels
    ema = PowerEMA(model, plan=edm2.ema.plan(tracks=3))
    ema.update(1)
    assert len(ema.snapshot(tmp_path)) == 3
    with pytest.raises(
        ValueError, match="plan 'compcat' is not known: choose one of paper, compact, lean, small"
    ):
        PowerEMA(model, plan="compcat")
    with pytest.raises(ValueError, match="one of sigma_rels and plan"):
        PowerEMA(model, (0.1,), plan="compact")


def test_search_finds_the_bottom_of_a_bent_valley() -> None:
    found = minimise(
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, np.array([-1.0, 1.0]), steps=900
    )
    np.testing.assert_allclose(found, [1, 1], atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_range": (0.2, 0.1)}, r"0 < low < high < 0\.2887, got \(0\.2, 0\.1\)"),
        ({"dtype": "int4"}, "dtype 'int4' is not known"),
        ({"tracks": 0}, "tracks must be at least 1"),
        ({"tracks": 13}, "tracks must be at most 12"),
        ({"memory_bytes": 1000}, "memory_bytes needs num_params"),
        ({"storage_bytes": 1000, "num_params": 1000}, "does not hold one average of 1,000 parameters, 4,000"),
        ({"memory_bytes": 8000, "num_params": 1000, "tracks": 3}, "3 tracks need more than memory_bytes"),
        ({"storage_bytes": 8000, "num_params": 1000, "tracks": 3}, "3 tracks at 1 times are more files"),
    ],
)
def test_bad_wishes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edm2.ema.plan(**options)  # type: ignore[arg-type]


def test_errors_in_mid_run_are_those_of_what_is_stored_by_then() -> None:
    lean = PLANS["lean"]
    widths = spread(RANGE, 9)
    for at, stored in ((0.371, 1), (0.5, 2), (0.6091, 2), (0.7, 3), (1.0, 4)):
        expected, _ = best_errors(lean.times[:stored], lean.sigma_rels, at, widths, "fp32")
        np.testing.assert_allclose(lean.errors(widths, at=at), expected, rtol=1e-9)
    assert lean.worst_error(at=0.7) > 2 * lean.worst_error()


def test_time_before_anything_is_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at 0\.2 is outside \[0\.371, 1\]"):
        PLANS["lean"].errors([0.1], at=0.2)
    assert torch.isfinite(torch.from_numpy(PLANS["lean"].errors([0.05, 0.1], at=0.7))).all()
