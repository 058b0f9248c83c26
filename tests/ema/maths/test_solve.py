"""The solver that knows how weights move: against closed forms, the plain solve, and simulated walks."""

import numpy as np
import pytest
from scipy.optimize import nnls

from edm2.ema import sigma_rel_to_gamma, solve_coefficients
from edm2.ema.maths.motion import KINDS, WHITE, Grid, Kind, Motion, fit_motion, nonnegative_least_squares
from edm2.ema.maths.profiles import power_inner
from edm2.ema.maths.solve import solve_motion
from edm2.ema.maths.targets import PowerProfile

WALK = Motion(powers={Kind(order=1, slowing=0.0): 1.0}, misfit=0.0)
PAPER = [(t, s) for t in np.arange(1, 17) / 16 for s in (0.05, 0.1)]
COMPACT = [(1.0, s) for s in (0.023, 0.044, 0.063, 0.122, 0.196, 0.244)]
WIDTHS = (0.03, 0.045, 0.07, 0.085, 0.11, 0.15, 0.2, 0.24)


def power(t: float, sigma_rel: float) -> PowerProfile:
    return PowerProfile(float(t), sigma_rel_to_gamma(sigma_rel))


@pytest.mark.parametrize(
    ("t", "s", "t2", "s2"), [(1.0, 0.05, 0.7, 0.1), (1.0, 0.01, 1.0, 0.25), (0.1, 0.2, 1.0, 0.03)]
)
def test_grid_integrates_profiles_exactly(t: float, s: float, t2: float, s2: float) -> None:
    p, q = power(t, s), power(t2, s2)
    grid = Grid([p, q])
    difference = grid.column(p, WHITE) - grid.column(q, WHITE)
    exact = sum(
        sign * power_inner(a.t, a.gamma, b.t, b.gamma) for a, b, sign in [(p, p, 1), (p, q, -2), (q, q, 1)]
    )
    assert difference @ difference == pytest.approx(float(exact), rel=1e-6)


def test_walk_distance_has_its_closed_form() -> None:
    p, q = power(1.0, 0.1), power(1.0, 0.2)
    grid = Grid([p, q])
    a, b = p.gamma + 1, q.gamma + 1
    exact = 1 / (2 * a + 1) - 2 / (a + b + 1) + 1 / (2 * b + 1)
    difference = grid.column(p, WALK) - grid.column(q, WALK)
    assert difference @ difference == pytest.approx(exact, rel=1e-8)


def test_drift_distance_has_its_closed_form() -> None:
    p, q = power(1.0, 0.1), power(1.0, 0.2)
    drift = Motion(powers={Kind(order=2, slowing=0.0): 1.0}, misfit=0.0)
    grid = Grid([p, q])
    a, b = p.gamma + 2, q.gamma + 2
    exact = 1 / (a * a * (2 * a + 1)) - 2 / (a * b * (a + b + 1)) + 1 / (b * b * (2 * b + 1))
    difference = grid.column(p, drift) - grid.column(q, drift)
    assert difference @ difference == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("stored", [PAPER[-8:], COMPACT])
def test_white_noise_without_rounding_is_the_plain_solve(stored: list[tuple[float, float]]) -> None:
    profiles = [power(t, s) for t, s in stored]
    targets = [power(1.0, s) for s in WIDTHS]
    grid = Grid([*profiles, *targets])
    ours = solve_motion(grid, profiles, np.zeros(len(profiles)), targets, WHITE)
    plain = solve_coefficients([t for t, _ in stored], [s for _, s in stored], 1.0, WIDTHS)
    columns = np.stack([grid.column(p, WHITE) for p in profiles], axis=1)
    for j, solution in enumerate(ours):
        aim = grid.column(targets[j], WHITE)
        misfit = np.linalg.norm(columns @ plain[:, j] - aim) / np.linalg.norm(aim)
        assert solution.coefficients.sum() == pytest.approx(1.0, abs=1e-10)
        # The plain solve scales to a sum of 1 afterwards, ours is the best of those that sum to 1.
        assert 0.9 * misfit < solution.profile_misfit <= misfit * (1 + 1e-9)


def test_stored_profile_is_taken_as_it_is() -> None:
    profiles = [power(t, s) for t, s in PAPER]
    (solution,) = solve_motion(Grid(profiles), profiles, np.full(32, 1e-3), [power(1.0, 0.1)], WALK)
    np.testing.assert_array_equal(solution.coefficients, np.eye(32)[-1])
    assert solution.moved == 0.0


def test_rounding_keeps_coefficients_small() -> None:
    profiles = [power(t, s) for t, s in PAPER]
    target = [power(1.0, 0.02)]
    grid = Grid([*profiles, *target])
    (exact,) = solve_motion(grid, profiles, np.full(32, 1e-8), target, WALK)
    (rounded,) = solve_motion(grid, profiles, np.full(32, 1e-2), target, WALK)
    assert rounded.amplification < 0.6 * exact.amplification
    assert np.hypot(rounded.moved, rounded.rounding) < np.hypot(exact.moved, 1e-2 * exact.amplification)


def test_hundreds_of_snapshots_stay_well_behaved() -> None:
    profiles = [power(t, s) for t in np.arange(1, 257) / 256 for s in (0.05, 0.1)]
    targets = [power(1.0, s) for s in (0.03, 0.07, 0.13, 0.25)]
    solutions = solve_motion(Grid([*profiles, *targets]), profiles, np.full(512, 1e-7), targets, WHITE)
    for solution in solutions:
        assert solution.amplification < 7
        assert solution.profile_misfit < 0.003


def walk(rng: np.random.Generator, steps: int, size: int) -> np.ndarray:
    return 1 + np.cumsum(0.003 * rng.standard_normal((steps, size)), axis=0)


@pytest.mark.parametrize("stored", [PAPER, PAPER[3::4], COMPACT, PAPER[-2:]])
def test_on_walks_the_solution_beats_the_plain_one_and_the_estimate_holds(
    stored: list[tuple[float, float]],
) -> None:
    steps = 800
    path = walk(np.random.default_rng(1), steps, 3000)
    profiles = [power(steps * t, s) for t, s in stored]
    targets = [power(steps, s) for s in WIDTHS]
    averages = np.stack([weights(p, steps) @ path for p in profiles])
    norm = np.linalg.norm(averages[-1])
    squares = ((averages[:, None] - averages[None]) ** 2).sum(-1) / norm**2
    to_weights = np.array(
        [((a - path[int(p.t) - 1]) ** 2).sum() for a, p in zip(averages, profiles, strict=True)]
    )
    rounding = np.full(len(stored), 1e-8)
    grid = Grid([*profiles, *targets])
    motion = fit_motion(grid, profiles, squares, rounding, to_weights / norm**2)
    plain = solve_coefficients([p.t for p in profiles], [s for _, s in stored], steps, WIDTHS)
    for j, solution in enumerate(solve_motion(grid, profiles, rounding, targets, motion)):
        truth = weights(targets[j], steps) @ path
        error = np.linalg.norm(solution.coefficients @ averages - truth) / norm
        assert error <= 1.001 * np.linalg.norm(plain[:, j] @ averages - truth) / norm
        assert error / 2 < solution.moved < 2.5 * error


def weights(profile: PowerProfile, steps: int) -> np.ndarray:
    return np.diff(profile.cumulative(np.arange(steps + 1.0)))


def test_motion_of_a_walk_is_recognised() -> None:
    profiles = [power(t, s) for t, s in PAPER]
    grid = Grid(profiles)
    rows = np.stack([grid.column(p, WALK) for p in profiles])
    squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    motion = fit_motion(grid, profiles, 0.25 * squares, np.zeros(32), np.full(32, np.nan))
    assert sum(p for kind, p in motion.powers.items() if kind == Kind(order=1, slowing=0.0)) > 0.2
    assert motion.misfit < 0.05
    assert set(motion.powers) == set(KINDS)


def test_nonnegative_least_squares_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = rng.standard_normal((12, 7)), rng.standard_normal(12)
        np.testing.assert_allclose(nonnegative_least_squares(a, b), nnls(a, b)[0], atol=1e-9)
