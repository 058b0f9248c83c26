"""Sampling with a consistency model: a few evaluations, each from noise of a chosen level."""

import math

import pytest
import torch

from edm2.diffusion import consistency_steps, sample_consistency

STD = 0.5


def exact(x, sigma, labels):
    """The consistency function of Gaussian data: the end of the ODE's path through x."""
    return x * STD / torch.sqrt(STD**2 + sigma**2)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_an_exact_model_gives_the_data_in_any_number_of_steps(num_steps):
    levels = []
    noise = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    found = sample_consistency(
        exact,
        noise,
        consistency_steps(num_steps),
        randn_like=lambda x: torch.randn(x.shape, generator=draws),
        callback=lambda i, sigma, x, denoised: levels.append(float(sigma)),
    )
    assert found.std() == pytest.approx(STD, rel=0.02)
    assert len(levels) == num_steps
    if num_steps == 1:  # one step keeps to the path that starts at the noise
        assert torch.allclose(found, STD * noise, rtol=1e-4)


def test_later_steps_start_from_fresh_noise_of_their_level():
    seen = []

    def denoiser(x, sigma, labels):
        seen.append(float(x))
        return torch.full_like(x, 7.0)

    steps = consistency_steps(3, (2.0, 0.5), sigma_max=10.0)
    found = sample_consistency(denoiser, torch.ones(1, 1, 1, 1), steps, randn_like=torch.ones_like)
    assert seen == [10.0, 9.0, 7.5]
    assert float(found) == 7.0


def test_standard_levels_are_even_in_the_logarithm():
    assert consistency_steps(1).tolist() == [80.0, 0.0]
    assert consistency_steps(2).tolist() == pytest.approx([80.0, math.sqrt(24.0 * 0.2), 0.0])
    assert consistency_steps(2, sigma_max=10.0).tolist() == pytest.approx([10.0, math.sqrt(3.0 * 0.2), 0.0])
    logs = consistency_steps(5, sigma_max=10.0)[1:-1].log()
    assert torch.allclose(logs.diff(), torch.tensor(math.log(0.2 / 3) / 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0,), "num_steps 0 must be at least 1"),
        ((2, ()), r"0 noise levels \(\) for 2 steps: give 1, for all but the first step"),
        ((3, (0.5, 2.0)), r"noise levels \(0.5, 2.0\) must descend from below 80 to above 0"),
        ((2, (90.0,)), "must descend from below 80"),
        ((2, (math.nan,)), "must descend"),
    ],
)
def test_levels_that_do_not_fit_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        consistency_steps(*arguments)
