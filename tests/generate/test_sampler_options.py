"""Sampler options mean what they say, and options without an effect are refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import latent_coding, small_denoiser, small_generator
from torch import Tensor

from edm2.diffusion import sample_heun, time_steps
from edm2.generate import ImageGenerator, SamplerOptions


def constant(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
    return torch.full_like(x, 3.0)


def test_noise_reaches_the_sampler_that_takes_it() -> None:
    noise, given = torch.zeros(1, 1, 1, 1), []

    def randn_like(x: Tensor) -> Tensor:
        given.append(x)
        return torch.ones_like(x)

    def counted(**options: Any) -> int:
        given.clear()
        SamplerOptions(**{"sampler": "heun", "num_steps": 8} | options).sample(
            constant, noise, randn_like=randn_like
        )
        return len(given)

    levels = time_steps(8)[:-1]
    assert counted() == counted(sampler="euler") == counted(sampler="dpmpp-2m") == 0
    assert counted(s_churn=1.0) == 8
    assert counted(s_churn=1.0, s_min=0.1, s_max=10.0) == int(((levels >= 0.1) & (levels <= 10)).sum())
    assert counted(sampler="dpmpp-2m-sde") == 7
    louder = SamplerOptions(sampler="heun", num_steps=2, s_churn=1.0, s_noise=2.0)
    seen: list[float] = []

    def watched(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        seen.append(float(x))
        return torch.zeros_like(x)

    louder.sample(watched, noise, randn_like=torch.ones_like)
    assert seen[0] == pytest.approx(2 * 80 * math.sqrt((math.sqrt(2)) ** 2 - 1))


def test_denoised_images_are_clipped_to_the_range_of_pixels() -> None:
    generator = small_generator()
    low, high = (
        generator.decode(torch.full((1, 1, 8, 8), -9.0)),
        generator.decode(torch.full((1, 1, 8, 8), 9.0)),
    )
    assert (low.min(), high.max()) == (0, 255)
    seen: list[Tensor] = []

    def sampler(denoiser: Any, noise: Tensor, sigmas: Tensor, labels: Tensor | None) -> Tensor:
        def kept(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
            seen.append(denoiser(x, sigma, labels))
            return seen[-1]

        return sample_heun(kept, 4 * noise, sigmas, labels)

    for clip in (False, True):
        seen.clear()
        generator.latents([0], sampler=sampler, num_steps=4, clip_denoised=clip)
        assert (float(torch.cat(seen).abs().max()) > 1.001) is not clip


def test_latents_are_not_clipped() -> None:
    generator = ImageGenerator(small_denoiser(channels=2), latent_coding())
    with pytest.raises(ValueError, match="clip_denoised is for models of pixels, whose range is known"):
        generator.latents([0], clip_denoised=True)


def test_record_holds_what_is_not_the_default() -> None:
    main = dict(name="heun", num_steps=4, sigma_min=0.002, sigma_max=80.0, rho=7.0, guidance=1.0)
    assert SamplerOptions(sampler="heun", num_steps=4).to_json() == main
    assert SamplerOptions(sampler="heun", num_steps=4, s_churn=2.0).to_json() == {**main, "s_churn": 2.0}


def test_schedules_that_suit_the_samplers() -> None:
    assert SamplerOptions() == SamplerOptions(sampler="dpmpp-3m", num_steps=24, rho=10.0)
    assert torch.equal(SamplerOptions().sigmas(), time_steps(24, rho=10.0))
    for sampler in ("heun", "euler", "dpmpp-2m", sample_heun):
        assert torch.equal(SamplerOptions(sampler=sampler).sigmas(), time_steps())
    assert torch.equal(SamplerOptions(num_steps=8, rho=7.0).sigmas(), time_steps(8))


def test_few_levels_of_the_third_order_sampler_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    for levels in (
        SamplerOptions(),
        SamplerOptions(num_steps=30),
        SamplerOptions(sampler="heun", num_steps=4),
    ):
        assert levels.num_steps
    assert not recwarn.list
    with pytest.warns(
        match=r"dpmpp-3m with 12 noise levels makes worse .* dpmpp-2m: .* or at least 24 levels"
    ):
        SamplerOptions(num_steps=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=0), "num_steps 0 must be at least 1"),
        (dict(sampler="rk4"), "unknown sampler 'rk4': there are heun, euler, dpmpp-2m, dpmpp-2m-sde"),
        (dict(guidance=math.nan), "guidance nan must be finite"),
        (dict(guidance=2.0, interval=(3.0, 1.0)), r"interval \(3, 1\] is empty: 0 <= low < high must hold"),
        (
            dict(guidance=2.0, interval=(90.0, 100.0)),
            r"interval \(90, 100\] holds none of the schedule's noise levels, 0.002 to 80: choose one",
        ),
        (dict(interval=(0.1, 1.0)), r"interval \(0.1, 1\] has no effect with guidance 1"),
        (dict(s_churn=-1.0), "s_churn -1.0 must be at least 0 and finite; 0 adds no noise"),
        (dict(s_churn=1.0, sampler="euler"), "the sampler euler has no s_churn: leave it out, or choose"),
        (
            dict(sampler="heun", s_churn=1.0, s_min=2.0, s_max=1.0),
            "s_min 2 and s_max 1: 0 <= s_min < s_max must hold",
        ),
        (dict(sampler="heun", s_churn=1.0, s_noise=-1.0), "s_noise -1.0 must be at least 0 and finite"),
        (dict(s_min=1.0), "s_min 1, s_max inf and s_noise 1 have no effect without s_churn"),
        (dict(s_noise=1.1), "have no effect without s_churn: give it a value above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerOptions(**options)


def test_the_highest_noise_level_is_that_of_the_run() -> None:
    chosen, plain = small_generator(), small_generator()
    chosen.info = {**chosen.info, "sigma_max": 200.0}
    images = chosen.images(range(3), num_steps=4)
    assert np.array_equal(images, plain.images(range(3), num_steps=4, sigma_max=200.0))
    assert not np.array_equal(images, plain.images(range(3), num_steps=4))
    assert np.array_equal(
        chosen.images(range(3), num_steps=4, sigma_max=80.0), plain.images(range(3), num_steps=4)
    )


def test_a_student_takes_its_own_sampler_and_no_other() -> None:
    student, plain = small_generator(), small_generator()
    student.info = {**student.info, "consistency": {"teacher": "t", "sigma_max": 20.0}}
    assert student.sampler_options().sigmas()[0] == 20
    default = student.images(range(4))
    assert np.array_equal(default, student.images(range(4), sampler="consistency", num_steps=2))
    assert not np.array_equal(default, student.images(range(4), num_steps=4))
    # Each image's noise depends on its own seed and step.
    assert np.array_equal(default[2:], student.images([2, 3]))
    for generator, options, told in (
        (student, {"sampler": "heun"}, "the model is a student, which the sampler heun does not suit"),
        (student, {"sigma_max": 40.0}, "trained to start at noise level 20, not at 40: leave sigma_max out"),
        (plain, {"sampler": "consistency"}, "is for a student, and this model is not one: make one with"),
        (plain, {"levels": (1.0,)}, r"levels \(1.0,\) are for the sampler consistency, not dpmpp-3m"),
    ):
        with pytest.raises(ValueError, match=told):
            generator.images(range(2), **options)
