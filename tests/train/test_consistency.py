"""Consistency tuning: its pairs of noise levels, its loss, and runs that are stopped and continued."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.cli import main
from edm2.data import ArrayDataset
from edm2.diffusion import build_denoiser, load_model, read_model_header, save_model
from edm2.distill import distill, first_level, open_teacher, student_settings
from edm2.hub import Pretrained
from edm2.hub.pretrained import Sampling
from edm2.nn.fast import FoldedConv
from edm2.train import ConsistencyConfig, OptimizerConfig, Stopped, TrainConfig, train
from edm2.train.consistency import ConsistencyObjective, Teacher, lower_levels, pseudo_huber
from edm2.train.objectives import TrainingBatch
from edm2.train.run_folder import read_config
from edm2.train.settings_file import run_settings

NETWORK: dict[str, Any] = dict(
    model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
)
OPTIONS = ConsistencyConfig(halvings=4, halving_images=100, sigma_max=80.0)


def test_the_gap_is_halved_until_the_schedule_ends():
    sigma = torch.tensor([20.0, 80.0])
    for images, gap in ((0, 1 / 4), (100, 1 / 8), (150, 2**-3.5), (400, 1 / 64), (10_000, 1 / 64)):
        assert torch.allclose(1 - lower_levels(sigma, images, OPTIONS) / sigma, torch.tensor(gap))


def test_low_levels_meet_clean_images_first_and_never_cross():
    sigma = torch.logspace(-2.7, 1.9, 200)
    assert lower_levels(torch.tensor([0.1, 0.5]), 0, OPTIONS).tolist() == [0, 0]
    for images in range(0, 600, 100):
        lower = lower_levels(sigma, images, OPTIONS)
        assert ((lower == 0) | (lower >= 0.002)).all()
        assert (lower < sigma).all()
    assert (lower_levels(sigma, 400, OPTIONS) >= lower_levels(sigma, 100, OPTIONS)).all()


def test_the_distance_is_quadratic_near_and_linear_far():
    error = torch.full((1, 1, 2, 2), 1e-3)  # norm 2e-3
    assert torch.allclose(pseudo_huber(error, 1.0), torch.tensor(1e-6), rtol=1e-2)  # |e|^2 / 2c, with c = 2
    assert torch.allclose(pseudo_huber(error, 1e-6), torch.tensor(2e-3), rtol=1e-2)


class Constant:
    """A denoiser that is consistent: it always knows the one image there is."""

    sigma_data, label_dim, augment_dim, cond_channels = 0.5, 0, 0, 0

    def __init__(self, image: float) -> None:
        self.image = image

    def __call__(self, x, sigma, labels=None, return_logvar=False, **given):
        found = torch.full_like(x, self.image)
        return (found, torch.zeros(len(x), 1, 1, 1)) if return_logvar else found


def batch_of(image: float, num_images: int) -> TrainingBatch:
    return TrainingBatch(
        images=torch.full((64, 1, 2, 2), image), index=torch.arange(64), num_images=num_images
    )


@pytest.mark.parametrize("path", ["data", "teacher"])
def test_a_consistent_denoiser_of_the_only_image_has_no_loss(path):
    config = TrainConfig(consistency=dataclasses.replace(OPTIONS, path=path))
    objective = ConsistencyObjective(config, Teacher(Constant(0.3), {}))
    assert objective(Constant(0.3), batch_of(0.3, 200)).abs().max() < 1e-3
    # Where r is 0 the target is the image itself, which another constant misses.
    assert objective(Constant(0.8), batch_of(0.3, 0)).max() > 0.1


def test_paths_of_the_teacher_follow_its_guidance_in_the_interval_alone():
    options = dataclasses.replace(OPTIONS, path="teacher", guidance=2.0, interval=(0.5, 2.0))
    objective = ConsistencyObjective(
        TrainConfig(consistency=options), Teacher(Constant(1.0), {}, Constant(0.5))
    )
    sigma = torch.tensor([0.5, 0.6, 2.0, 2.1]).reshape(-1, 1, 1, 1)
    found = objective._denoise(torch.zeros(4, 1, 1, 1), sigma, None, {})
    assert found.flatten().tolist() == [1.0, 1.5, 1.5, 1.0]


class Gaussian:
    """The denoiser of images whose pixels are normal with standard deviation 0.5; its paths are known."""

    def __call__(self, x, sigma, labels=None, **given):
        return x * 0.25 / (0.25 + sigma**2)


def test_a_step_of_the_teacher_follows_its_path_to_second_order():
    objective = ConsistencyObjective(TrainConfig(consistency=OPTIONS), Teacher(Gaussian(), {}))
    t = torch.tensor([0.2, 1.0, 5.0]).reshape(-1, 1, 1, 1)
    errors = []
    for share in (0.8, 0.9):
        exact = ((0.25 + (share * t) ** 2) / (0.25 + t**2)).sqrt()
        errors.append((objective._step(torch.ones(3, 1, 1, 1), t, share * t, None, {}) - exact).abs())
    assert (errors[1] < errors[0] / 6).all()
    # To level 0 there is one evaluation, which gives the denoised image.
    ends = objective._step(torch.ones(3, 1, 1, 1), t, 0 * t, None, {})
    assert torch.allclose(ends, Gaussian()(torch.ones(3, 1, 1, 1), t))


def test_students_start_from_noise_that_hides_their_images():
    for size, level in ((4, 10.0), (8, 10.0), (16, 20.0), (32, 40.0), (128, 80.0)):
        assert first_level(build_denoiser(size, 1, **NETWORK)) == level


def test_guidance_needs_the_teachers_path():
    with pytest.raises(
        ValueError, match=r"path 'data' cannot follow .* guidance 2: choose --consistency.path"
    ):
        ConsistencyConfig(guidance=2.0)
    for name, value, rule in (
        ("halvings", 21, "between 0 and 20"),
        ("halving_images", 0, "at least 1"),
        ("huber", 0.0, "above 0"),
        ("sigma_max", 4.0, "at least 5"),
    ):
        with pytest.raises(ValueError, match=f"{name} {value} must be {rule}"):
            ConsistencyConfig(**{name: value})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(tiny_config(), out, dataset=tiny_data(), quiet=True)
    return out


def test_students_compute_in_full_precision_and_draw_levels_up_to_their_first(teacher, monkeypatch):
    opened, base = open_teacher(teacher), dataclasses.replace(run_settings(teacher), dtype="bfloat16")
    monkeypatch.setattr("edm2.distill.run_settings", lambda _: base)
    config = student_settings(opened, teacher)
    assert (config.dtype, config.loss.p_mean, config.loss.p_std) == ("float32", -0.4, 1.4)
    monkeypatch.setattr("edm2.distill.first_level", lambda _: 16.0)
    loss = student_settings(opened, teacher).loss
    assert loss.p_mean + 1.93 * loss.p_std == pytest.approx(math.log(16), abs=0.03)
    assert loss.p_mean - 1.93 * loss.p_std == pytest.approx(-0.4 - 1.93 * 1.4, abs=0.03)


def settings(teacher: Path, **changes: Any) -> TrainConfig:
    config = student_settings(open_teacher(teacher), teacher)
    short: dict[str, Any] = dict(num_images=96, batch_size=8, log_images=16, checkpoint_images=24)
    return dataclasses.replace(config, **{**short, **changes})


def test_a_student_starts_from_its_teacher_and_says_what_it_is(teacher, tmp_path, capsys):
    noisy, sigma, labels = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 80.0]), torch.arange(3)
    seen = []

    def look(trainer):
        with torch.no_grad():
            seen.append(trainer.denoiser.eval()(noisy, sigma, labels))
        trainer.denoiser.train()

    # With a vanishing rate a step changes nothing. (Forced normalisation changes weights, and not what they do.)
    config = settings(teacher, optimizer=OptimizerConfig(ref_lr=1e-12))
    opened = open_teacher(teacher)
    model = distill(opened, tmp_path / "student", config, dataset=tiny_data(), quiet=True, on_step=look)
    assert torch.allclose(seen[0], opened.generator.denoiser(noisy, sigma, labels), atol=1e-5)
    found = read_model_header(model)[1]["info"]
    assert found["consistency"] == {"teacher": found["consistency"]["teacher"], "sigma_max": 10.0}
    assert "with EMA 0.1" in found["consistency"]["teacher"]
    with pytest.raises(ValueError, match=r"is a student already: give its teacher"):
        open_teacher(tmp_path / "student")
    assert run_settings(tmp_path / "student").consistency.teacher == found["consistency"]["teacher"]
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path / "student")])
    assert "is a student's run: give its teacher to `edm2 distill`" in capsys.readouterr().err


class Killed(Exception):
    """Unlike after KeyboardInterrupt, the thread that writes a checkpoint has ended when this one arrives."""


@pytest.mark.parametrize("path", ["data", "teacher"])
def test_a_student_that_was_stopped_and_killed_is_the_one_that_was_not(teacher, tmp_path, path):
    options = ConsistencyConfig(path=path, halvings=3)
    config = settings(teacher, consistency=options)
    distill(open_teacher(teacher), tmp_path / "whole", config, dataset=tiny_data(), quiet=True)

    def disturb(trainer):
        if trainer.num_images == 40:
            trainer.request_stop()
        if trainer.num_images == 64:
            raise Killed

    for _ in range(3):
        with contextlib.suppress(Stopped, Killed):
            distill(
                open_teacher(teacher), tmp_path / "pieces", config, dataset=tiny_data(), quiet=True,
                on_step=disturb,
            )  # fmt: skip
            break
    distill(open_teacher(teacher), tmp_path / "pieces", config, dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "pieces") == log_of(tmp_path / "whole")


def test_refusals_come_before_anything_is_written(teacher, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no run \(thesis.txt\)"):
        distill(open_teacher(teacher), foreign, settings(teacher), dataset=tiny_data(), quiet=True)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"has no model.safetensors: restore it from a copy, or start with"):
        train(settings(teacher), tmp_path / "new", dataset=tiny_data(), quiet=True)
    with pytest.raises(SystemExit):
        main(["distill", str(teacher), "--out", str(tmp_path / "x"), "--network.num-blocks", "3"])
    assert (
        "the student has the teacher's network: leave --network and its options out"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "x").exists()


def test_a_regression_is_no_teacher(teacher, tmp_path):
    denoiser, info = load_model(teacher)
    file = save_model(
        tmp_path / "mean.safetensors",
        denoiser.options,
        denoiser.state_dict(),
        {**info, "objective": "mean"},
    )
    with pytest.raises(ValueError, match=r"is a regression or a residual model: give a diffusion model"):
        open_teacher(file)


def test_the_data_must_be_like_the_teachers(teacher, tmp_path):
    larger = ArrayDataset(np.zeros((6, 1, 8, 8), np.uint8), np.arange(6) % 3, name="larger")
    with pytest.raises(
        ValueError, match=r"'larger' has images \(1, 8, 8\) with 3 classes, and the teacher makes"
    ):
        distill(open_teacher(teacher), tmp_path / "x", settings(teacher), dataset=larger, quiet=True)


def test_another_teacher_needs_another_folder(teacher, tmp_path):
    distill(open_teacher(teacher), tmp_path / "x", settings(teacher), dataset=tiny_data(), quiet=True)
    with pytest.raises(ValueError, match=r"holds another run \(consistency.teacher \w+ with EMA 0.1 there"):
        distill(
            open_teacher(teacher, 0.05), tmp_path / "x", settings(teacher), dataset=tiny_data(), quiet=True
        )


def test_a_guided_teacher_is_kept_with_its_guide(teacher, tmp_path):
    opened = open_teacher(teacher)
    guided = Pretrained(
        opened.generator,
        guide=open_teacher(teacher, 0.05).generator,
        sampling=Sampling(guidance=1.5, interval=(0.1, math.inf)),
    )
    used: list[Teacher] = []
    model = distill(
        guided, tmp_path / "x", student_settings(guided, teacher), dataset=tiny_data(), quiet=True,
        on_step=lambda trainer: used.append(trainer._stepper.objective.teacher),
    )  # fmt: skip
    made = read_config(tmp_path / "x")["settings"]["consistency"]
    assert (made["path"], made["guidance"], made["interval"]) == ("teacher", 1.5, [0.1, 80.0])
    assert " guided by " in read_model_header(model)[1]["info"]["consistency"]["teacher"]
    kept = Teacher.load(tmp_path / "x")
    assert kept.guide is not None
    noisy, sigma, labels = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 80.0]), torch.arange(3)
    for ours, theirs, fast in (
        (kept.model, guided.generator, used[0].model),
        (kept.guide, guided.guide, used[0].guide),
    ):
        state = theirs.denoiser.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
        assert any(isinstance(layer, FoldedConv) for layer in fast.modules())
        assert torch.allclose(fast(noisy, sigma, labels), ours(noisy, sigma, labels), atol=1e-5)
