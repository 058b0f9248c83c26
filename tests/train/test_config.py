"""Settings that cannot work are refused before any work, by name and with the rule."""

import dataclasses
from typing import Any

import pytest
import torch

from edm2.ema.maths.plans import named_plan
from edm2.train import DataConfig, EMAConfig, LossConfig, NetworkConfig, OptimizerConfig, TrainConfig
from edm2.train.build import ema_device


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (
            TrainConfig,
            {"num_images": -5},
            r"num_images -5 must be at least 1: change --images \(num_images in Python\)",
        ),
        (TrainConfig, {"batch_size": 0}, "batch_size 0 must be at least 1"),
        (TrainConfig, {"snapshot_images": 0}, "snapshot_images 0 must be at least 1"),
        (TrainConfig, {"checkpoint_images": -1}, "checkpoint_images -1 must be at least 1"),
        (TrainConfig, {"log_images": 0}, "log_images 0 must be at least 1"),
        (TrainConfig, {"keep_checkpoints": 0}, "keep_checkpoints 0 must be at least 1"),
        (TrainConfig, {"stop_after_nonfinite": 0}, "stop_after_nonfinite 0 must be at least 1"),
        (TrainConfig, {"keep_every": -1}, "keep_every -1 must be 0 or more"),
        (TrainConfig, {"workers": -1}, "workers -1 must be 0 or more"),
        (TrainConfig, {"max_hours": 0.0}, "max_hours 0.0 must be above 0"),
        (TrainConfig, {"loss_scaling": 0.0}, "loss_scaling 0.0 must be above 0 and finite"),
        (TrainConfig, {"seed": -1}, r"seed -1 must be in \[0, 2\^63\)"),
        (TrainConfig, {"seed": 2**63}, r"must be in \[0, 2\^63\)"),
        (TrainConfig, {"batch_size": 8, "microbatch": 3}, "microbatch 3 must be a divisor of batch 8"),
        (TrainConfig, {"batch_size": 8, "microbatch": 0}, "microbatch 0 must be a divisor of batch 8"),
        (TrainConfig, {"batch_size": 8, "microbatch": 16}, "microbatch 16 must be a divisor of batch 8"),
        (
            NetworkConfig,
            {"model_channels": 0},
            "model_channels 0 must be at least 1: change --network.model-channels ",
        ),
        (NetworkConfig, {"num_blocks": 0}, "num_blocks 0 must be at least 1"),
        (NetworkConfig, {"channels_per_head": 0}, "channels_per_head 0 must be at least 1"),
        (NetworkConfig, {"channel_mult": ()}, r"channel_mult \(\) must be one or more numbers"),
        (NetworkConfig, {"channel_mult": (1, 0)}, r"channel_mult \(1, 0\) must be one or more numbers"),
        (NetworkConfig, {"dropout": 1.0}, r"dropout 1.0 must be in \[0, 1\)"),
        (OptimizerConfig, {"ref_lr": 0.0}, "ref_lr 0.0 must be above 0 and finite"),
        (OptimizerConfig, {"ref_lr": float("inf")}, "ref_lr inf must be above 0 and finite"),
        (OptimizerConfig, {"ref_batches": -1}, "ref_batches -1 must be 0 or more"),
        (OptimizerConfig, {"rampup_mimg": -0.5}, "rampup_mimg -0.5 must be 0 or more"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\) must be in \[0, 1\)"),
        (OptimizerConfig, {"eps": 0.0}, "eps 0.0 must be above 0"),
        (LossConfig, {"p_mean": float("nan")}, "p_mean nan must be finite"),
        (LossConfig, {"p_std": 0.0}, "p_std 0.0 must be above 0 and finite"),
        (LossConfig, {"sigma_data": -1.0}, "sigma_data -1.0 must be above 0 and finite"),
        (EMAConfig, {"sigma_rels": ()}, r"sigma_rels \(\) must be one or more different lengths"),
        (EMAConfig, {"sigma_rels": (0.1, 0.1)}, "must be one or more different lengths"),
        (EMAConfig, {"sigma_rels": (0.4,)}, "sigma_rel"),
        (DataConfig, {"coding": "fixed"}, "data coding 'fixed' with mean"),
        (DataConfig, {"coding": "latents", "mean": (0.0,)}, "'fixed' and 'latents' need both"),
        (DataConfig, {"coding": "plain", "mean": (0.0,), "std": (1.0,)}, "the others take neither"),
    ],
)
def test_wrong_settings(kind: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_number_of_steps_reaches_the_images() -> None:
    assert TrainConfig(num_images=64, batch_size=8).num_steps == 8
    assert TrainConfig(num_images=65, batch_size=8).num_steps == 9


def test_identity_is_what_the_result_depends_on() -> None:
    base = TrainConfig()
    network = dataclasses.replace(base.network, dropout=0.5)
    for same in ({"num_images": 1}, {"device": "cpu"}, {"data": "elsewhere"}, {"keep_checkpoints": 9}):
        assert dataclasses.replace(base, **same).run_id("data") == base.run_id("data")
    for other in ({"seed": 1}, {"batch_size": 8}, {"dtype": "bfloat16"}, {"network": network}):
        assert dataclasses.replace(base, **other).run_id("data") != base.run_id("data")
    assert base.run_id("other data") != base.run_id("data")


def test_default_averages_cost_a_thirty_second_of_the_papers_and_lose_nothing() -> None:
    config, paper, compact = TrainConfig(), named_plan("paper"), named_plan("compact")
    assert config.ema.sigma_rels == compact.sigma_rels
    times = config.num_images // config.snapshot_interval
    assert len(config.ema.sigma_rels) * times * 32 <= paper.num_files
    assert compact.worst_error() <= paper.worst_error()


def test_mirror_does_not_suit_latents() -> None:
    with pytest.raises(ValueError, match="mirror does not suit latents"):
        DataConfig(coding="latents", mean=(0.0,), std=(1.0,), mirror=True)


def test_averages_live_beside_the_weights_unless_told_otherwise() -> None:
    net = torch.nn.Linear(2, 2)
    assert ema_device(TrainConfig(), net) is None
    assert ema_device(TrainConfig(ema_device="cpu"), net) == "cpu"
