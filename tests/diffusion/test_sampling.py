import itertools
import math
import typing

import numpy as np
import pytest
import torch

from edm2.diffusion import (
    SAMPLERS,
    Denoiser,
    SamplerName,
    WithoutLabels,
    draw_sigma,
    edm2_loss,
    find_sampler,
    guided,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
    time_steps,
)

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def tiny(golden, fill_by_rule):
    return fill_by_rule(Denoiser(**golden("net_tiny_state.json")["config"])).eval()


@pytest.fixture(scope="module")
def guide(golden, fill_by_rule):
    config = dict(
        golden("net_tiny_state.json")["config"], model_channels=16, channels_per_head=16, label_dim=0
    )
    return fill_by_rule(Denoiser(**config), "guide.").eval()


def test_heun_equals_golden(golden, tiny, guide, relative_error):
    data = golden("sampler_tiny.npz")
    noise, labels = torch.from_numpy(data["noise"]), torch.from_numpy(data["labels"])
    calls = []

    def randn_like(x):
        calls.append(1)
        rng = np.random.default_rng(31 + 100 + len(calls))
        return torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32))

    plain = sample_heun(tiny, noise, labels, num_steps=8)
    assert relative_error(plain, data["plain_8"]) < 1e-4
    out = sample_heun(tiny, noise, labels, num_steps=32, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert relative_error(out, data["plain_32_fp64"]) < 1e-4
    out = sample_heun(tiny, noise, labels, num_steps=8, guide=guide, guidance=1.7)
    assert relative_error(out, data["guided_8_w1.7"]) < 1e-4
    churn = dict(s_churn=10, s_min=0.05, s_max=50, s_noise=1.003)
    out = sample_heun(tiny, noise, labels, num_steps=8, randn_like=randn_like, **churn)
    assert relative_error(out, data["churn_8"]) < 1e-4
    assert len(calls) == int(data["churn_noise_calls"])


def gaussian_denoiser(mean, std):
    """Exact denoiser of N(mean, std^2) data."""
    return lambda x, sigma, labels: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def exact_solution(noise, mean, std, sigma_max):
    """The ODE's exact end point: (x - mean) shrinks in proportion to sqrt(std^2 + sigma^2)."""
    return mean + (sigma_max * noise - mean) * std / math.sqrt(std**2 + sigma_max**2)


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("euler", 1), ("dpmpp-2m", 2)])
def test_order_of_convergence_to_the_exact_solution(name, order):
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_solution(noise, 0.3, 0.5, 80)
    # The last step, to 0, is an Euler step: a tiny sigma_min keeps its error out of the picture.
    settings = dict(sigma_min=1e-8, rho=9, dtype=torch.float64)
    errors = []
    for num_steps in (80, 160, 320):
        out = SAMPLERS[name](gaussian_denoiser(0.3, 0.5), noise, num_steps=num_steps, **settings)
        errors.append(float((out - exact).abs().max()))
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_euler_equals_hand_computation():
    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    # D(x) = x / 2, so dx/dsigma = x / (2 sigma): the levels are 4, 1, 0.
    out = sample_euler(
        lambda x, s, c: x / 2, noise, num_steps=2, sigma_min=1.0, sigma_max=4.0, dtype=torch.float64
    )
    x = 4 * 0.3
    x = x + (1 - 4) * (x / 2) / 4
    assert float(out) == pytest.approx(x + (0 - 1) * (x / 2) / 1, rel=1e-12)


def test_multistep_equals_hand_computation():
    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    seen = []

    def denoiser(x, sigma, labels):
        seen.append(float(x))
        return x / 2

    out = sample_dpmpp_2m(
        denoiser, noise, num_steps=3, sigma_min=1.0, sigma_max=9.0, rho=1, dtype=torch.float64
    )
    # Levels 9, 5, 1, 0. First and last step take the denoised images as constant, the second extrapolates them.
    x0 = 9 * 0.3
    x1 = 5 / 9 * x0 + (1 - 5 / 9) * x0 / 2
    slope = (x1 / 2 - x0 / 2) / math.log(9 / 5)
    x2 = 1 / 5 * x1 + (1 - 1 / 5) * (x1 / 2 + slope * math.log(5) / 2)
    assert seen == pytest.approx([x0, x1, x2], rel=1e-12)
    assert float(out) == pytest.approx(x2 / 2, rel=1e-12)


def test_guidance_acts_in_its_interval_alone():
    for name, evaluations in {"heun": 15, "euler": 8, "dpmpp-2m": 8}.items():
        seen = {"main": [], "guide": []}

        def counted(who, seen=seen):
            def denoiser(x, sigma, labels):
                seen[who].append(float(sigma))
                return torch.zeros_like(x)

            return denoiser

        options = dict(guide=counted("guide"), guidance=2.0, interval=(0.1, 10.0), num_steps=8)
        SAMPLERS[name](counted("main"), torch.zeros(1, 1, 1, 1), **options)
        assert len(seen["main"]) == evaluations
        assert seen["guide"] == [s for s in seen["main"] if 0.1 < s <= 10.0]
        assert 0 < len(seen["guide"]) < evaluations


def test_default_schedule_solves_a_gaussian_to_two_percent():
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    out = sample_heun(gaussian_denoiser(0.0, 0.5), noise)
    assert torch.allclose(out, exact_solution(noise, 0.0, 0.5, 80), rtol=2e-2, atol=1e-6)


def test_churn_keeps_the_distribution():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    out = sample_heun(
        gaussian_denoiser(0.2, 0.5),
        noise,
        num_steps=64,
        s_churn=20,
        dtype=torch.float64,
        randn_like=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )
    assert float(out.mean()) == pytest.approx(0.2, abs=0.03)
    assert float(out.std()) == pytest.approx(0.5, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), out.flatten()]))[0, 1])) < 0.5


def test_number_of_evaluations_and_what_the_guide_costs():
    calls = {"main": 0, "guide": 0}

    def counted(name):
        def denoiser(x, sigma, labels):
            calls[name] += 1
            return torch.zeros_like(x)

        return denoiser

    noise = torch.zeros(1, 1, 2, 2)
    sample_heun(counted("main"), noise, guide=counted("guide"))
    assert calls == {"main": 63, "guide": 0}
    sample_heun(counted("main"), noise, guide=counted("guide"), guidance=1.5, num_steps=4)
    assert calls == {"main": 70, "guide": 7}


def test_guidance_interpolates_and_extrapolates():
    main, guide = (lambda x, s, c: x + 1), (lambda x, s, c: x)
    x = torch.zeros(1)
    for weight in (0.0, 0.5, 2.0):
        assert float(guided(main, guide, weight)(x, x, None)) == weight
    assert guided(main, guide, 1.0) is main


def test_a_network_guides_itself_without_labels_in_one_evaluation_where_that_is_faster(tiny, relative_error):
    sizes = []

    def network(x, sigma, labels):
        sizes.append(len(x))
        return tiny(x, sigma, labels)

    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    options = dict(guidance=1.7, interval=(0.1, 10.0), num_steps=4)
    for labels in (torch.tensor([3, 1]), torch.randn(2, tiny.label_dim)):
        separate = sample_heun(tiny, noise, labels, guide=lambda x, s, c: tiny(x, s, None), **options)
        one = WithoutLabels(network, tiny.label_dim)
        sizes.clear()
        joint = [
            sample_heun(network, noise[i : i + 1], labels[i : i + 1], guide=one, **options) for i in (0, 1)
        ]
        assert relative_error(torch.cat(joint), separate) < 1e-5
        # Of the levels 80, 9.7, 0.47 and 0.002 two lie inside, the guide's share of 4 + 3 evaluations being 2 + 2.
        assert sizes == [1, 2, 2, 2, 2, 1, 1] * 2
        sizes.clear()
        larger = sample_heun(network, noise, labels, guide=one, **options)
        assert relative_error(larger, separate) < 1e-5
        assert sizes == [2] * 11
    assert relative_error(sample_heun(tiny, noise, labels, num_steps=4), separate) > 0.1


def test_a_guide_without_labels_is_not_joined_to_another_network(tiny):
    x, labels = torch.ones(1, *SHAPE), torch.tensor([3])
    main = guided(lambda *_: torch.zeros(1), WithoutLabels(tiny, tiny.label_dim), 2.0)
    assert torch.equal(main(x, torch.tensor(1.0), labels), -tiny(x, torch.tensor(1.0), None))
    with pytest.raises(ValueError, match="a guide without labels has no effect where the images have none"):
        main(x, torch.tensor(1.0), None)


def test_schedule_ends_and_defaults():
    steps = time_steps()
    assert len(steps) == 33
    assert float(steps[0]) == pytest.approx(80)
    assert float(steps[-2]) == pytest.approx(0.002)
    assert float(steps[-1]) == 0
    assert (steps.diff() < 0).all()
    assert time_steps(1).tolist() == pytest.approx([80, 0])


def test_samplers_go_by_their_names():
    assert {*SAMPLERS} == {*typing.get_args(SamplerName)}
    assert find_sampler("euler") is sample_euler
    with pytest.raises(ValueError, match="unknown sampler 'rk4': there are heun, euler, dpmpp-2m"):
        find_sampler("rk4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=0), "num_steps 0 must be at least 1"),
        (dict(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max must hold"),
        (dict(rho=-1.0), "rho -1.0 must be positive"),
        (dict(s_churn=1.0), "s_churn 1.0 adds noise: pass randn_like"),
        (dict(guidance=1.5), "guidance 1.5 needs a guide"),
        (dict(guidance=2.0, guide=gaussian_denoiser(0, 1), interval=(3.0, 1.0)), "0 <= low < high must hold"),
        (
            dict(guidance=2.0, guide=gaussian_denoiser(0, 1), interval=(90.0, 100.0)),
            r"interval \(90, 100\] of guidance holds none of the schedule's noise levels, 0.002 to 80",
        ),
        (dict(interval=(0.1, 1.0)), r"interval \(0.1, 1\] of guidance, but guidance 1 is none"),
        (dict(guidance=math.nan), "guidance nan must be finite"),
    ],
)
def test_bad_sampler_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample_heun(gaussian_denoiser(0, 1), torch.zeros(1, 1, 1, 1), **options)


class Uncertain:
    """A denoiser with known error and uncertainty."""

    sigma_data = 0.5

    def __call__(self, x, sigma, labels=None, return_logvar=False, **kwargs):
        return torch.zeros_like(x), torch.full((len(x), 1, 1, 1), 0.7)


def test_loss_closed_form_and_best_uncertainty():
    images = torch.full((2, 1, 1, 1), 0.3)
    sigma = torch.tensor([0.2, 3.0])
    loss = edm2_loss(Uncertain(), images, None, sigma, torch.ones_like(images))
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * 0.09 / math.exp(0.7) + 0.7
    assert torch.allclose(loss.flatten(), expected)


def test_sigma_is_log_normal():
    log_sigma = draw_sigma(torch.arange(40000), p_mean=-0.8, p_std=1.6, seed=4).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.8, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.6, abs=0.03)
