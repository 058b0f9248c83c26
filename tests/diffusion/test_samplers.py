import itertools
import math
import typing

import numpy as np
import pytest
import torch

from edm2.diffusion import (
    SAMPLERS,
    Churn,
    SamplerName,
    WithoutLabels,
    build_denoiser,
    clipped,
    draw_sigma,
    edm2_loss,
    find_sampler,
    guided,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m,
    sample_euler,
    sample_heun,
    time_steps,
)

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def tiny(golden, fill_by_rule):
    return fill_by_rule(build_denoiser(**golden("net_tiny_state.json")["config"])).eval()


@pytest.fixture(scope="module")
def guide(golden, fill_by_rule):
    config = dict(
        golden("net_tiny_state.json")["config"], model_channels=16, channels_per_head=16, label_dim=0
    )
    return fill_by_rule(build_denoiser(**config), "guide.").eval()


def test_heun_equals_golden(golden, tiny, guide, relative_error):
    data = golden("sampler_tiny.npz")
    noise, labels = torch.from_numpy(data["noise"]), torch.from_numpy(data["labels"])
    calls = []

    def randn_like(x):
        calls.append(1)
        rng = np.random.default_rng(31 + 100 + len(calls))
        return torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32))

    sigmas = time_steps(8)
    plain = sample_heun(tiny, noise, sigmas, labels)
    assert relative_error(plain, data["plain_8"]) < 1e-4
    out = sample_heun(tiny, noise, time_steps(32), labels, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert relative_error(out, data["plain_32_fp64"]) < 1e-4
    out = sample_heun(guided(tiny, guide, 1.7), noise, sigmas, labels)
    assert relative_error(out, data["guided_8_w1.7"]) < 1e-4
    churn = Churn(10, 0.05, 50, 1.003, randn_like)
    out = sample_heun(tiny, noise, sigmas, labels, churn=churn)
    assert relative_error(out, data["churn_8"]) < 1e-4
    assert len(calls) == int(data["churn_noise_calls"])


def gaussian_denoiser(mean, std):
    """Exact denoiser of N(mean, std^2) data."""
    return lambda x, sigma, labels: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def exact_solution(noise, mean, std, sigma_max):
    """The ODE's exact end point: (x - mean) shrinks in proportion to sqrt(std^2 + sigma^2)."""
    return mean + (sigma_max * noise - mean) * std / math.sqrt(std**2 + sigma_max**2)


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("euler", 1), ("dpmpp-2m", 2), ("dpmpp-3m", 3)])
def test_order_of_convergence_to_the_exact_solution(name, order):
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_solution(noise, 0.3, 0.5, 80)
    # The last step, to 0, is an Euler step: a tiny sigma_min keeps its error out of the picture.
    errors = []
    for num_steps in (80, 160, 320):
        sigmas = time_steps(num_steps, sigma_min=1e-8, rho=9)
        out = SAMPLERS[name](gaussian_denoiser(0.3, 0.5), noise, sigmas, dtype=torch.float64)
        errors.append(float((out - exact).abs().max()))
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_euler_equals_hand_computation():
    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    # D(x) = x / 2, so dx/dsigma = x / (2 sigma): the levels are 4, 1, 0.
    sigmas = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    out = sample_euler(lambda x, s, c: x / 2, noise, sigmas, dtype=torch.float64)
    x = 4 * 0.3
    x = x + (1 - 4) * (x / 2) / 4
    assert float(out) == pytest.approx(x + (0 - 1) * (x / 2) / 1, rel=1e-12)


def test_multistep_equals_hand_computation():
    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    seen = []

    def denoiser(x, sigma, labels):
        seen.append(float(x))
        return x / 2

    sigmas = torch.tensor([9.0, 5.0, 1.0, 0.0], dtype=torch.float64)
    out = sample_dpmpp_2m(denoiser, noise, sigmas, dtype=torch.float64)
    # First and last step take the denoised images as constant, the second extrapolates them.
    x0 = 9 * 0.3
    x1 = 5 / 9 * x0 + (1 - 5 / 9) * x0 / 2
    slope = (x1 / 2 - x0 / 2) / math.log(9 / 5)
    x2 = 1 / 5 * x1 + (1 - 1 / 5) * (x1 / 2 + slope * math.log(5) / 2)
    assert seen == pytest.approx([x0, x1, x2], rel=1e-12)
    assert float(out) == pytest.approx(x2 / 2, rel=1e-12)


def test_third_order_multistep_is_exact_for_a_parabola():
    """Where the denoised images are a parabola in lambda = -ln sigma, only the first two steps are approximate."""

    def parabola(sigma):
        return 0.3 - 0.2 * math.log(sigma) + 0.1 * math.log(sigma) ** 2

    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    seen = []
    sigmas = torch.tensor([9.0, 5.0, 2.0, 1.5, 0.4, 0.0], dtype=torch.float64)
    sample_dpmpp_3m(
        lambda x, sigma, labels: torch.full_like(x, parabola(float(sigma))), noise, sigmas,
        callback=lambda i, sigma, x, denoised: seen.append(float(x)), dtype=torch.float64,
    )  # fmt: skip
    # x = sigma (x0 / sigma0 + int e^l D(l) dl), by the antiderivative of e^l (a + b l + c l^2).
    a, b, c = 0.3, 0.2, 0.1

    def antiderivative(sigma):
        time = -math.log(sigma)
        return (a - b + 2 * c + (b - 2 * c) * time + c * time**2) / sigma

    levels = sigmas.tolist()
    for i in (2, 3):
        grown = seen[i] / levels[i] + antiderivative(levels[i + 1]) - antiderivative(levels[i])
        assert seen[i + 1] == pytest.approx(levels[i + 1] * grown, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_acts_in_its_interval_alone(name):
    seen = {"main": [], "guide": []}

    def counted(who):
        def denoiser(x, sigma, labels):
            assert sigma.device.type == "cpu"
            assert sigma.ndim == 0
            seen[who].append(float(sigma))
            return torch.zeros_like(x)

        return denoiser

    # Ends that are levels: the upper one belongs to the interval, the lower one does not, whatever the precision.
    levels = time_steps(8).tolist()
    network = guided(counted("main"), counted("guide"), 2.0, (levels[5], levels[2]))
    SAMPLERS[name](network, torch.zeros(1, 1, 1, 1), time_steps(8))
    assert len(seen["main"]) == (15 if name == "heun" else 8)
    inside = [s for s in seen["main"] if levels[5] + 1e-6 < s <= levels[2] + 1e-3]
    assert seen["guide"] == inside
    assert len(inside) == (6 if name == "heun" else 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step(name):
    seen = []
    SAMPLERS[name](
        lambda x, s, c: x / 4,
        torch.ones(1, 1, 1, 1),
        time_steps(3),
        callback=lambda i, sigma, x, denoised: seen.append(
            (i, float(sigma), bool((denoised == x / 4).all()))
        ),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert [sigma for _, sigma, _ in seen] == pytest.approx(time_steps(3)[:-1].tolist())
    assert all(fits for _, _, fits in seen)


def test_sde_without_noise_is_the_ode():
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    denoiser = gaussian_denoiser(0.3, 0.5)
    out = sample_dpmpp_2m_sde(denoiser, noise, time_steps(8), eta=0.0, randn_like=None)
    assert torch.equal(out, sample_dpmpp_2m(denoiser, noise, time_steps(8)))


def test_sde_step_equals_hand_computation():
    """Where the data is one point c, a step from s to t has mean c + (t/s)^2 (x - c), variance t^2 (1 - (t/s)^2)."""
    seen, noise = [], torch.tensor([[[[0.3]]]], dtype=torch.float64)

    def denoiser(x, sigma, labels):
        seen.append(float(x))
        return torch.full_like(x, 0.7)

    sigmas = torch.tensor([9.0, 5.0, 1.0, 0.0], dtype=torch.float64)
    out = sample_dpmpp_2m_sde(
        denoiser, noise, sigmas, s_noise=1.1, randn_like=torch.ones_like, dtype=torch.float64
    )
    x = 9 * 0.3
    for x_seen, s, t in zip(seen, (9, 5, 1), (5, 1, 0), strict=True):
        assert x_seen == pytest.approx(x)
        x = 0.7 + (t / s) ** 2 * (x - 0.7) + 1.1 * t * math.sqrt(1 - (t / s) ** 2)
    assert float(out) == pytest.approx(0.7)


def test_sde_keeps_the_distribution():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    out = sample_dpmpp_2m_sde(
        gaussian_denoiser(0.2, 0.5),
        noise,
        time_steps(64),
        randn_like=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        dtype=torch.float64,
    )
    assert float(out.mean()) == pytest.approx(0.2, abs=0.03)
    assert float(out.std()) == pytest.approx(0.5, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), out.flatten()]))[0, 1])) < 0.1


def test_clipped_denoiser():
    low, high = torch.tensor([-1.0, -0.5])[:, None, None], torch.tensor([0.5, 1.0])[:, None, None]
    out = clipped(lambda x, s, c: 3 * x, low, high)(torch.ones(1, 2, 1, 1), torch.ones(()), None)
    assert out.flatten().tolist() == [0.5, 1.0]
    out = clipped(lambda x, s, c: 3 * x, -1.0, 1.0)(-torch.ones(1, 2, 1, 1), torch.ones(()), None)
    assert out.flatten().tolist() == [-1.0, -1.0]


def test_default_schedule_solves_a_gaussian_to_two_percent():
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    out = sample_heun(gaussian_denoiser(0.0, 0.5), noise, time_steps())
    assert torch.allclose(out, exact_solution(noise, 0.0, 0.5, 80), rtol=2e-2, atol=1e-6)


def test_churn_keeps_the_distribution():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    out = sample_heun(
        gaussian_denoiser(0.2, 0.5),
        noise,
        time_steps(64),
        churn=Churn(20, randn_like=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)),
        dtype=torch.float64,
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
    sample_heun(guided(counted("main"), counted("guide"), 1.0), noise, time_steps())
    assert calls == {"main": 63, "guide": 0}
    sample_heun(guided(counted("main"), counted("guide"), 1.5), noise, time_steps(4))
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
    sigmas, settings = time_steps(4), (1.7, (0.1, 10.0))
    for labels in (torch.tensor([3, 1]), torch.randn(2, tiny.label_dim)):
        apart = guided(tiny, lambda x, s, c: tiny(x, s, None), *settings)
        separate = sample_heun(apart, noise, sigmas, labels)
        one = guided(network, WithoutLabels(network, tiny.label_dim), *settings)
        sizes.clear()
        joint = [sample_heun(one, noise[i : i + 1], sigmas, labels[i : i + 1]) for i in (0, 1)]
        assert relative_error(torch.cat(joint), separate) < 1e-5
        # Of the levels 80, 9.7, 0.47 and 0.002 two lie inside, the guide's share of 4 + 3 evaluations being 2 + 2.
        assert sizes == [1, 2, 2, 2, 2, 1, 1] * 2
        sizes.clear()
        larger = sample_heun(one, noise, sigmas, labels)
        assert relative_error(larger, separate) < 1e-5
        assert sizes == [2] * 11
    assert relative_error(sample_heun(tiny, noise, sigmas, labels), separate) > 0.1


def test_a_guide_without_labels_is_not_joined_to_another_network(tiny):
    x, labels = torch.ones(1, *SHAPE), torch.tensor([3])
    main = guided(lambda *_: torch.zeros(1), WithoutLabels(tiny, tiny.label_dim), 2.0)
    assert torch.equal(main(x, torch.tensor(1.0), labels), -tiny(x, torch.tensor(1.0), None))
    with pytest.raises(ValueError, match="a guide without labels has no effect on images without labels"):
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
    with pytest.raises(
        ValueError, match="unknown sampler 'rk4': there are heun, euler, dpmpp-2m, dpmpp-2m-sde, dpmpp-3m"
    ):
        find_sampler("rk4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=0), "num_steps 0 must be at least 1"),
        (dict(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max must hold"),
        (dict(rho=-1.0), "rho -1.0 must be positive"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        time_steps(**options)


def test_bad_guidance():
    denoiser = gaussian_denoiser(0, 1)
    with pytest.raises(ValueError, match=r"guidance 1\.5 needs a guide"):
        guided(denoiser, None, 1.5)
    with pytest.raises(ValueError, match=r"interval \(3, 1\] is empty: 0 <= low < high must hold"):
        guided(denoiser, denoiser, 2.0, (3.0, 1.0))


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
