"""Regressions and diffusion of their residuals: closed forms, exact resumes, samples, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data
from torch import Tensor

from edm2.cli import main
from edm2.data import ArrayDataset, PairedDataset
from edm2.diffusion import load_model
from edm2.generate import ImageGenerator
from edm2.generate.checks import check_guide
from edm2.hub import open_pretrained, save_pretrained
from edm2.hub.export import export_model
from edm2.train import DataConfig, OptimizerConfig, Stopped, TrainConfig, Trainer, train
from edm2.train.consistency import Teacher
from edm2.train.inputs import code_batch
from edm2.train.logs import VALIDATION_FILE, read_log
from edm2.train.objectives import MEAN_SIGMA, MeanObjective, TrainingBatch
from edm2.train.residual import MEAN_FILE, open_residual
from edm2.tuning import TuningPlan

COUNT = 64
RNG = np.random.default_rng(0)
CONDITIONS = RNG.normal(3, 2, (COUNT, 1, 4, 4)).astype(np.float32)
# Two channels, one of them hardly noisy; in units of their own.
NOISE = RNG.normal(0, 1, (COUNT, 2, 4, 4)) * np.array([20.0, 2.0])[:, None, None]
TARGETS = (280 + np.array([10.0, -30.0])[:, None, None] * (CONDITIONS - 3) + NOISE).astype(np.float32)


def pairs(count: int = COUNT) -> PairedDataset:
    return PairedDataset(ArrayDataset(TARGETS[:count], name="pairs"), ArrayDataset(CONDITIONS[:count]))


def run(out: Path, stop: int | None = None, *, data: Any = None, **changes: Any) -> Path:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == stop:
            trainer.request_stop()

    config = tiny_config(**{"record_magnitudes": False, **changes})
    return train(config, out, dataset=data or pairs(), quiet=True, on_step=on_step)


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A regression that has learned something."""
    out = tmp_path_factory.mktemp("mean") / "mean"
    options = OptimizerConfig(ref_lr=0.05, ref_batches=40, rampup_mimg=0.0001)
    run(out, objective="mean", num_images=1600, optimizer=options, validation="0.125")
    return str(out)


class Constant:
    """Expects the same value everywhere, and reports an uncertainty."""

    sigma_data = 0.5

    def __call__(self, x: Tensor, sigma: Tensor, *_: Any, **given: Any) -> Any:
        assert not x.any()
        assert sigma.tolist() == [MEAN_SIGMA] * len(x)
        answer = torch.full_like(x, 0.25)
        return (answer, torch.full((len(x), 1, 1, 1), 0.3)) if "return_logvar" in given else answer


def test_the_loss_of_a_regression() -> None:
    batch = TrainingBatch(images=torch.ones(3, 1, 2, 2), index=torch.arange(3), num_images=0)
    objective = MeanObjective(tiny_config())
    expected = 0.75**2 * (MEAN_SIGMA**2 + 0.25) / (MEAN_SIGMA * 0.5) ** 2
    loss = objective(Constant(), batch)  # type: ignore[arg-type]
    assert loss.flatten().tolist() == pytest.approx([expected / np.exp(0.3) + 0.3] * 12)


def test_a_regression_learns_and_says_so_on_held_out_images(mean: str) -> None:
    records = read_log(Path(mean), VALIDATION_FILE)
    assert records[0]["levels"] == [MEAN_SIGMA]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    # Its samples are its answer, whatever the seed.
    generator = ImageGenerator.load(mean)
    conditions = CONDITIONS[:4]
    first, second = (generator.images(range(s, s + 4), conditions=conditions) for s in (0, 10))
    assert np.array_equal(first, second)
    error = ((first - TARGETS[:4]) ** 2).mean((0, 2, 3))
    assert (error < 0.6 * TARGETS.var((0, 2, 3)))[1]


def test_residuals_have_the_deviation_of_data_and_come_back(mean: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(residual=mean), pairs(), tmp_path / "run")
    assert trainer.residual is not None
    batch = next(trainer._stepper._batches_from(0))
    plain = code_batch(batch, trainer.coding, seed=0, num_images=0)
    made = trainer._stepper._inputs(batch, 0)
    back = trainer.residual.add(made.images, None, plain.condition)
    torch.testing.assert_close(back, plain.images, rtol=1e-4, atol=1e-5)
    everything = trainer.dataset
    coded = code_batch(
        batch._replace(
            position=0,
            images=torch.from_numpy(everything.images(np.arange(COUNT))),
            conditions=torch.from_numpy(CONDITIONS),
        ),
        trainer.coding,
        seed=0,
        num_images=0,
    )
    residuals = trainer.residual.subtract(coded).images.double()
    assert residuals.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert residuals.square().mean((0, 2, 3)).sqrt().tolist() == pytest.approx([0.5, 0.5], rel=1e-4)


MODES: list[dict[str, Any]] = [{"objective": "mean"}, {}]


@pytest.mark.parametrize("changes", MODES, ids=["mean", "residual"])
def test_resume(mean: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    source = tmp_path / "regression"
    if not changes:
        run(source, objective="mean", num_images=16)
        changes = {"residual": str(source), "validation": "0.1"}
    run(tmp_path / "whole", **changes)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 72, **changes)
    if source.exists():
        source.rename(tmp_path / "moved")
    run(tmp_path / "parts", **changes)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts", VALIDATION_FILE) == log_of(tmp_path / "whole", VALIDATION_FILE)


def test_samples_are_the_regression_plus_a_residual(mean: str, tmp_path: Path) -> None:
    run(tmp_path / "run", residual=mean, num_images=80)
    for source in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        generator = ImageGenerator.load(source)
        residual = generator.residual
        assert residual is not None
        made = generator.images(range(4), conditions=CONDITIONS[:4], num_steps=4)
        expected = ImageGenerator.load(mean).images(range(4), conditions=CONDITIONS[:4])
        sampled = made - expected  # in kelvins
        assert 0 < np.abs(sampled).mean() < 200
        zero = generator.images(
            range(4),
            conditions=CONDITIONS[:4],
            num_steps=4,
            sampler=lambda d, noise, *_: torch.zeros_like(noise),
        )
        std = np.asarray(generator.coding.values.std) / 0.5
        shift = np.asarray(residual.mean) * std
        assert np.allclose(zero, expected + shift[:, None, None], atol=1e-2)
        assert generator.identity()["regression"] == residual.sha256[:16]


def test_models_made_from_the_run_take_the_regression_along(
    mean: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", residual=mean, num_images=80)
    main(
        ["ema", "reconstruct", str(tmp_path / "run"), "--sigma-rel", "0.07", "--out", str(tmp_path / "made")]
    )
    made = tmp_path / "made" / "ema-0.07.safetensors"
    assert ImageGenerator.load(made).residual is not None
    assert ImageGenerator.load(tmp_path / "run", 0.07).residual is not None
    (tmp_path / "made" / MEAN_FILE).unlink()
    with pytest.raises(ValueError, match=r"mean.safetensors is not next to it: copy that file from the run"):
        ImageGenerator.load(made)
    run(tmp_path / "other", objective="mean", num_images=8)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "made" / MEAN_FILE)
    with pytest.raises(ValueError, match=r"is not the regression that .* was trained with"):
        ImageGenerator.load(made)


def test_a_shared_folder_takes_the_regression_along(mean: str, tmp_path: Path) -> None:
    run(tmp_path / "run", residual=mean, num_images=16)
    expected = open_pretrained(tmp_path / "run").images(range(4), conditions=CONDITIONS[:4], num_steps=2)
    save_pretrained(tmp_path / "run", tmp_path / "shared")
    shutil.rmtree(tmp_path / "run")
    save_pretrained(tmp_path / "shared", tmp_path / "again")
    shutil.rmtree(tmp_path / "shared")
    opened = open_pretrained(tmp_path / "again")
    assert np.array_equal(opened.images(range(4), conditions=CONDITIONS[:4], num_steps=2), expected)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| Conditioned on | images, 4 x 4 x 1 |" in card
    assert "| Adds its images to | those that the regression `mean.safetensors` expects |" in card
    with pytest.raises(
        ValueError, match="a regression or a residual model, which exported samplers do not support"
    ):
        export_model(opened, "pt2", tmp_path / "exported")


def test_the_next_commands_of_a_regression_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("pairs.npz", images=TARGETS, conditions=CONDITIONS)
    sizes = (
        "model-channels 8",
        "channel-mult 1",
        "num-blocks 1",
        "attn-resolutions 4",
        "channels-per-head 8",
    )
    network = " ".join(f"--network.{size}" for size in sizes)
    start = "train --preset digits --data pairs.npz --objective mean --out mean --images 16 --batch 8"
    main(f"{start} {network}".split())
    sample, residual = next_commands(capsys)
    assert residual == "train --settings mean --objective denoise --residual mean --out mean-residual"
    main(sample.split())
    main(residual.split())
    sample, tune = next_commands(capsys)[-2:]
    assert tune == "tune mean-residual --metric crps --cases HELD_OUT_PAIRS"
    main(sample.split())
    assert Path("mean/samples.npz").exists()
    assert Path("mean-residual/samples.npz").exists()
    main(["report", "mean"])
    assert next_commands(capsys)[-1:] == ["sample mean --conditions pairs.npz --out mean/samples.npz"]


def next_commands(capsys: pytest.CaptureFixture[str]) -> list[str]:
    start = "next: edm2 "
    return [
        line.removeprefix(start) for line in capsys.readouterr().err.splitlines() if line.startswith(start)
    ]


def test_a_run_keeps_its_regression(mean: str, tmp_path: Path) -> None:
    run(tmp_path / "run", residual=mean, num_images=16)
    run(tmp_path / "other", objective="mean", num_images=8)
    with pytest.raises(ValueError, match=r"holds another run \(residual.sha256 .* there, .* here\)"):
        run(tmp_path / "run", residual=str(tmp_path / "other"), num_images=16)
    assert open_residual(tmp_path / "run", {}) is None


def test_mistakes(mean: str, tmp_path: Path) -> None:
    run(tmp_path / "diffusion", num_images=8)
    with pytest.raises(ValueError, match=r"is not a regression: train one with --objective mean"):
        run(tmp_path / "run", residual=str(tmp_path / "diffusion"))
    small = ArrayDataset(CONDITIONS[..., :2, :2])
    for data, told in (
        (tiny_data(), r"channels 2 there, 1 here; .*label size 0 there, 3 here"),
        (
            PairedDataset(ArrayDataset(TARGETS), small),
            r"conditions floats \[1, 4, 4\] there, floats \[1, 2, 2\] here",
        ),
        (
            PairedDataset(ArrayDataset(TARGETS, np.arange(COUNT) % 5), pairs().conditions),
            "label size 0 there, 5 here",
        ),
        (
            PairedDataset(pairs(), ArrayDataset(np.where(CONDITIONS > 6, np.nan, CONDITIONS), missing=True)),
            "missing values of conditions False there, True here",
        ),
    ):
        with pytest.raises(ValueError, match=f"was trained on other data .{told}"):
            run(
                tmp_path / "run",
                residual=mean,
                data=data,
                dataset=DataConfig(resample="nearest", missing="mask"),
            )
    with pytest.raises(ValueError, match="objective mean needs something to expect the image from"):
        run(tmp_path / "run", objective="mean", data=ArrayDataset(TARGETS))
    with pytest.raises(ValueError, match="give only one of them"):
        TrainConfig(objective="mean", residual="x")
    assert not (tmp_path / "run").exists()
    guide = ImageGenerator.load(mean)
    run(tmp_path / "run", residual=mean, num_images=8)
    with pytest.raises(ValueError, match="of residuals of the same regression, or both of images"):
        check_guide(ImageGenerator.load(tmp_path / "run"), guide)


def test_classes_alone_can_be_regressed_on(tmp_path: Path) -> None:
    model = run(tmp_path / "run", objective="mean", num_images=16, data=tiny_data())
    images = ImageGenerator.load(model).images(range(6))
    assert np.array_equal(images[:3], images[3:])


def test_other_runs_keep_their_names() -> None:
    assert tiny_config(objective="denoise").identity() == tiny_config().identity()
    assert tiny_config(objective="mean").run_id("x") != tiny_config().run_id("x")
    assert dataclasses.replace(tiny_config(), dataset=DataConfig()).run_id("x") == tiny_config().run_id("x")


def test_no_student_is_made_of_them(mean: str) -> None:
    denoiser, info = load_model(mean)
    with pytest.raises(ValueError, match="the teacher is a regression or a residual model"):
        Teacher(denoiser, info).check_data(pairs())


def test_a_regression_is_not_tuned(mean: str) -> None:
    with pytest.raises(
        ValueError, match="is a regression, which has no samples to tune: train the diffusion"
    ):
        TuningPlan.for_run(Path(mean))


def test_damaged_facts_of_a_residual_are_named(tmp_path: Path, mean: str) -> None:
    out = run(tmp_path / "run", residual=mean, num_images=16).parent
    facts = json.loads((out / "residual.json").read_text())["residual"]
    for change, told in (
        ({}, "residual.json is damaged"),
        ({"residual": None}, "residual.json is damaged"),
        ({"residual": {**facts, "std": [0.0, 1.0]}}, "residual.json is damaged"),
        (
            {"residual": {**facts, "mean": [0.0]}},
            "one mean and standard deviation for each of the 2 channels",
        ),
    ):
        (out / "residual.json").write_text(json.dumps(change))
        with pytest.raises(ValueError, match=told):
            run(out, residual=mean, num_images=16)
