"""Profiles to aim at: unit mass, their closed forms, and averages of a path done by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, Target, reconstruct, reconstruct_many, sigma_rel_to_gamma

STEPS = 200


def exponential(tau: np.ndarray) -> np.ndarray:
    return 0.5 ** ((STEPS - tau) / 20)


def ramped(tau: np.ndarray) -> np.ndarray:
    """Half-life 20, but no more than a fifth of the time: the share lost by the time is the integral of its inverse."""
    early = (np.minimum(tau, 100) / 100) ** (np.log(2) / 0.2)
    return early * 0.5 ** ((STEPS - np.maximum(tau, 100)) / 20)


CASES: list[tuple[Target, Callable[[np.ndarray], np.ndarray]]] = [
    (Target.power(0.13), lambda tau: (tau / STEPS) ** (sigma_rel_to_gamma(0.13) + 1)),
    (Target.power_gamma(3.0), lambda tau: (tau / STEPS) ** 4),
    (Target.exponential(20), lambda tau: exponential(tau) - exponential(np.zeros(1))),
    (Target.exponential(20, rampup_ratio=0.2), ramped),
    (Target.exponential(90, rampup_ratio=0.4), lambda tau: (tau / STEPS) ** (np.log(2) / 0.4)),
    (Target.uniform(80), lambda tau: np.clip((tau - 120) / 80, 0, 1)),
    (Target.linear(80), lambda tau: np.clip((tau - 120) / 80, 0, 1) ** 2),
    (Target.minus_sqrt(80), lambda tau: np.clip((tau - 120) / 80, 0, 1) ** 0.5),
    (Target.custom(lambda u: np.cos(3 * u) ** 2), lambda tau: tau / STEPS / 2 + np.sin(6 * tau / STEPS) / 12),
]


@pytest.mark.parametrize(("target", "mass"), CASES, ids=[c[0].label for c in CASES])
def test_profile_is_the_one_named(target: Target, mass: Callable[[np.ndarray], np.ndarray]) -> None:
    profile = target.at(STEPS)
    tau = np.linspace(0, STEPS, 2001)
    exact = mass(tau) / mass(np.array([float(STEPS)]))
    np.testing.assert_allclose(profile.cumulative(tau), exact, atol=2e-6)
    middle = (tau[1:] + tau[:-1]) / 2
    np.testing.assert_allclose(
        profile.density(middle).sum() * STEPS / 2000, 1.0, atol=0.02 if "sqrt" in target.label else 1e-3
    )
    area = np.concatenate([[0], np.cumsum((exact[1:] + exact[:-1]) / 2 * np.diff(tau))])
    np.testing.assert_allclose(profile.integral(tau), area, atol=2e-3)
    np.testing.assert_allclose(profile.integral(np.array([STEPS + 5.0])), area[-1] + 5, atol=2e-3)


@pytest.mark.parametrize(("target", "mass"), CASES, ids=[c[0].label for c in CASES])
def test_reconstruction_is_the_average_done_by_hand(
    tmp_path: Path, target: Target, mass: Callable[[np.ndarray], np.ndarray]
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40)
    ema = PowerEMA(model, (0.03, 0.06, 0.12, 0.24), clock="steps")
    history = []
    for t in range(1, STEPS + 1):
        with torch.no_grad():
            model.weight.add_(0.002 * torch.randn(40, 40, generator=generator))
        ema.update(t)
        history.append(model.weight.detach().double().clone())
        if t % 20 == 0:
            ema.snapshot(tmp_path)
    masses = mass(np.arange(STEPS + 1.0))
    truth = torch.tensordot(
        torch.from_numpy(np.diff(masses) / (masses[-1] - masses[0])), torch.stack(history), 1
    )
    result = reconstruct(tmp_path, target=target, warn_above=1.0)
    error = float((result.tensors["weight"] - truth).norm() / truth.norm())
    last = float((history[-1] - truth).norm() / truth.norm())
    assert error < 0.15 * last
    assert error < result.expected_error < 10 * error
    assert result.label == target.label


def test_several_targets_in_one_pass_and_in_mid_run_are_each_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(20, 20)
    ema = PowerEMA(model, plan="compact")
    for t in range(1, STEPS + 1):
        with torch.no_grad():
            model.weight.add_(0.002 * torch.randn(20, 20, generator=generator))
        ema.update(t)
        if t % 50 == 0:
            ema.snapshot(tmp_path)
    targets = [Target.power(0.1), Target.exponential(20), Target.uniform(60)]
    for t in (None, 150, 120):
        together = reconstruct_many(tmp_path, targets, t=t, warn_above=9)
        for target, one in zip(targets, together, strict=True):
            alone = reconstruct(tmp_path, target=target, t=t, warn_above=9)
            difference = (one.tensors["weight"] - alone.tensors["weight"]).norm() / one.tensors[
                "weight"
            ].norm()
            assert float(difference) < 0.1 * one.expected_error + 2e-7
            assert one.t == (t or STEPS)


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half_life must be above 0, got -1"):
        Target.exponential(-1)
    with pytest.raises(ValueError, match="rampup_ratio 0 must be above 0"):
        Target.exponential(20, rampup_ratio=0)
    with pytest.raises(ValueError, match="window must be above 0"):
        Target.uniform(0)
    with pytest.raises(ValueError, match="window 300 is longer than the training up to 200"):
        Target.linear(300).at(200)
    with pytest.raises(ValueError, match=r"density of 'odd' must give one finite weight >= 0"):
        Target.custom(lambda u: u - 0.5, label="odd")
    with pytest.raises(ValueError, match="density of 'custom' must give one"):
        Target.custom(lambda u: np.zeros(3))
    with pytest.raises(ValueError, match="give either sigma_rel or target"):
        reconstruct(tmp_path)
