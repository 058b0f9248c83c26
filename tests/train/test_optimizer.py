"""Rates, weight decay, clipping and the plain loss: closed forms, what is refused, and exact resumes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data
from torch import nn

from edm2.diffusion import load_model
from edm2.train import LossConfig, OptimizerConfig, Stopped, TrainConfig, Trainer, learning_rate, train
from edm2.train.gradients import clip_gradients
from edm2.train.optimizer import make_optimizer

RATE: dict[str, Any] = {"batch_size": 8, "ref_lr": 0.1, "ref_batches": 1}


@pytest.mark.parametrize(
    ("share", "factor"), [(0, 1), (0.25, (1 + math.sqrt(0.5)) / 2), (0.5, 0.5), (1, 0), (2, 0)]
)
def test_cosine(share: float, factor: float) -> None:
    lr = learning_rate(share * 1000, **RATE, rampup_mimg=0, cosine_images=1000)
    assert lr == pytest.approx(0.1 * factor, abs=1e-12)


def test_cosine_after_a_ramp_up() -> None:
    lr = learning_rate(100, **RATE, rampup_mimg=0.0002, cosine_images=1000)
    assert lr == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 10)) / 2)


def test_weights_decay_by_the_rate_and_biases_do_not() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = make_optimizer(layer, OptimizerConfig(weight_decay=0.2))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before[0] * (1 - 0.1 * 0.2))
    assert torch.equal(layer.bias.detach(), before[1])


def test_gradients_are_clipped_together() -> None:
    def clipped(largest: float, norm: float = 5.0) -> list[float]:
        gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
        clip_gradients(gradients, torch.tensor(norm), largest)
        return [float(g) for g in gradients]

    assert clipped(1.0) == pytest.approx([0.6, 0.8])
    assert clipped(5.0) == clipped(9.0) == clipped(1.0, math.nan) == clipped(1.0, math.inf) == [3.0, 4.0]


def run(out: Path, stop: int | None = None, **changes: Any) -> Path:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == stop:
            trainer.request_stop()

    return train(tiny_config(**changes), out, dataset=tiny_data(), quiet=True, on_step=on_step)


def options(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(ref_lr=0.01, rampup_mimg=0.00003, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "C", "optimizer": options(decay="cosine", weight_decay=0.1, clip=0.5)},
        {"config": "G", "optimizer": options(ref_batches=0, clip=0.5), "loss": LossConfig(uncertainty=False)},
    ],
)
def test_resume(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "whole", **changes)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 72, **changes)
    run(tmp_path / "parts", **changes)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_each_setting_changes_the_run(tmp_path: Path) -> None:
    base = log_of(run(tmp_path / "base", config="C", optimizer=options()).parent)[-1]["loss"]
    for i, change in enumerate(({"weight_decay": 0.5}, {"clip": 0.1}, {"decay": "cosine"})):
        made = run(tmp_path / str(i), config="C", optimizer=options(**change))
        assert log_of(made.parent)[-1]["loss"] != base, change


def test_a_model_without_uncertainty_is_that_of_edm(tmp_path: Path) -> None:
    denoiser, _ = load_model(run(tmp_path / "run", loss=LossConfig(uncertainty=False)))
    assert denoiser.uncertainty is None
    assert not any(name.startswith("logvar") for name in denoiser.state_dict())


def test_the_length_of_a_cosine_is_part_of_the_run(tmp_path: Path) -> None:
    run(tmp_path / "run", num_images=16, optimizer=options(decay="cosine"))
    with pytest.raises(ValueError, match=r"holds another run \(num_images 16 there, 32 here\)"):
        run(tmp_path / "run", num_images=32, optimizer=options(decay="cosine"))


def test_what_breaks_a_configuration_is_refused() -> None:
    for letter in "DEFG":
        with pytest.raises(ValueError, match=f"weight_decay 0.1 does not suit config {letter}: its weights"):
            tiny_config(config=letter, optimizer=OptimizerConfig(weight_decay=0.1))
    tiny_config(network_from="x:y", optimizer=OptimizerConfig(weight_decay=0.1))
    with pytest.raises(ValueError, match=r"loss.uncertainty True does not suit config A"):
        TrainConfig(config="A", loss=LossConfig(uncertainty=True))
    for name in ("weight_decay", "clip"):
        with pytest.raises(ValueError, match=f"{name} -1.0 must be 0 or more: change --optimizer.{name[:4]}"):
            OptimizerConfig(**{name: -1.0})
