"""Profiles against golden numbers and closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from edm2.ema import decay, gamma_to_sigma_rel, sigma_rel_to_gamma, solve_coefficients
from edm2.ema.maths.profiles import power_cumulative, power_density, power_inner, step_weight

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "phema.json").read_text())


def test_conversions_match_the_golden_numbers() -> None:
    for sigma_rel, gamma in GOLDEN["std_to_exp"].items():
        assert sigma_rel_to_gamma(float(sigma_rel)) == pytest.approx(gamma, rel=1e-12)
    for gamma, sigma_rel in GOLDEN["exp_to_std"].items():
        assert gamma_to_sigma_rel(float(gamma)) == pytest.approx(sigma_rel, rel=1e-12)


def test_conversions_invert_each_other() -> None:
    gammas = np.array([0.0, 0.1, 1.0, 17.0, 400.0, 1e5])
    np.testing.assert_allclose(sigma_rel_to_gamma(gamma_to_sigma_rel(gammas)), gammas, rtol=1e-9, atol=1e-9)
    assert isinstance(sigma_rel_to_gamma(0.1), float)


def test_decay_matches_the_golden_numbers() -> None:
    for case in GOLDEN["beta"]:
        beta = decay(case["t_next"], case["t_delta"], sigma_rel_to_gamma(case["std"]))
        assert beta == pytest.approx(case["beta"], rel=1e-12)


def test_step_weight_keeps_its_digits_where_the_decay_is_nearly_one() -> None:
    assert step_weight(1e12, 1.0, 6.0) == pytest.approx(7e-12, rel=1e-9)


def test_profile_has_unit_mass_and_the_named_width() -> None:
    t, sigma_rel = 7.0, 0.1
    tau = (np.arange(200_000) + 0.5) / 200_000 * t
    weight = power_density(tau, t, sigma_rel_to_gamma(sigma_rel)) * t / tau.size
    mean = (weight * tau).sum()
    assert weight.sum() == pytest.approx(1.0, abs=1e-8)
    assert np.sqrt((weight * (tau - mean) ** 2).sum()) / t == pytest.approx(sigma_rel, rel=1e-6)


def test_density_has_the_golden_shape() -> None:
    golden = GOLDEN["response"]
    ours = power_density(np.arange(golden["len"]), golden["ofs"], sigma_rel_to_gamma(golden["std"]))
    np.testing.assert_allclose(ours / ours.sum(), golden["values"], rtol=1e-9, atol=1e-15)


def test_cumulative_is_the_integral_of_the_density() -> None:
    tau = np.linspace(0, 5, 100_001)
    density = power_density(tau, 4.0, 3.0)
    numeric = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(tau))])
    np.testing.assert_allclose(power_cumulative(tau, 4.0, 3.0), numeric, atol=1e-4)


def test_inner_product_is_the_integral_of_the_product() -> None:
    tau = (np.arange(400_000) + 0.5) / 400_000 * 5.0
    for a, b in [((5.0, 3.0), (4.0, 7.0)), ((2.0, 1.0), (5.0, 0.5)), ((3.0, 2.0), (3.0, 2.0))]:
        numeric = (power_density(tau, *a) * power_density(tau, *b)).sum() * 5.0 / tau.size
        assert float(power_inner(*a, *b)) == pytest.approx(numeric, rel=1e-4)


def test_plain_solve_matches_the_golden_coefficients() -> None:
    for case in GOLDEN["coefs"]:
        ours = solve_coefficients(case["in_ofs"], case["in_std"], case["out_ofs"], case["out_std"])
        assert ours.shape == np.shape(case["coefs"])
        np.testing.assert_allclose(ours, case["coefs"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.sum(axis=0), 1.0, rtol=1e-12)


def test_plain_solve_returns_a_stored_average_itself_and_leaves_later_ones_out() -> None:
    x = solve_coefficients([10, 10, 20, 20, 30], [0.05, 0.1, 0.05, 0.1, 0.05], 20, [0.1])
    np.testing.assert_allclose(x[:, 0], [0, 0, 0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_width_out_of_range_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"is outside \(0, 0\.2887\]"):
        sigma_rel_to_gamma(sigma_rel)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        gamma_to_sigma_rel(-0.5)
    with pytest.raises(ValueError, match="dt must be in"):
        decay(5, 6, 1.0)
    with pytest.raises(ValueError, match="of one length"):
        solve_coefficients([1, 2], [0.1], 2, [0.1])
    with pytest.raises(ValueError, match="given twice"):
        solve_coefficients([1, 1], [0.1, 0.1], 2, [0.1])
    with pytest.raises(ValueError, match="no snapshot is in"):
        solve_coefficients([5], [0.1], 2, [0.1])
