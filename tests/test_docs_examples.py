"""Python in README and docs runs as it is printed."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edm2.ema
from edm2.data import open_dataset
from edm2.ema.maths import planning
from edm2.ema.storage.manifest import read_manifest
from edm2.train import NetworkConfig, TrainConfig

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    found: list[str] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    return found


def block(page: str, words: str) -> str:
    """The one block of a page that contains some words."""
    (found,) = [code for code in blocks(page) if words in code]
    return found


def train_step(model: nn.Module, batch: torch.Tensor) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.001 * torch.randn(p.shape))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples take for granted, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {
        "torch": torch,
        "edm2": edm2,
        "model": nn.Linear(4, 4),
        "loader": range(4000),
        "train_step": train_step,
        "evaluate": lambda model: 0.0,
    }


@pytest.mark.parametrize("page", ["README.md", "docs/ema.md"])
def test_first_example_of_averages(
    page: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(block(page, "ema.snapshot("), names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {1000, 2000, 3000, 4000}
    assert "relative error" in capsys.readouterr().out


def test_better_averages(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("docs/better_averages.md"):
        exec(code, names)
    assert "sigma_rel 0.08" in capsys.readouterr().out
    other = edm2.ema.PowerEMA(names["model"])
    other.load_state_dict(names["checkpoint"]["ema"])
    assert other.t == 4000


def test_an_average_of_your_decay(names: dict[str, Any]) -> None:
    names["loader"] = range(1000)
    ema = edm2.ema.PowerEMA(names["model"], plan="compact")
    for step in range(1, 100_001, 100):
        ema.update(step)
    ema.snapshot("snapshots")
    exec(block("docs/ema.md", "half_life"), names)
    assert "exponential" in names["average"].label


def test_plan(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_STEPS", 30)  # a short search will do here
    exec(block("docs/ema.md", "edm2.ema.plan("), names)
    planning._found.cache_clear()
    assert isinstance(names["plan"], edm2.ema.Plan)
    assert names["plan"].storage_bytes(100_000_000) <= 6 << 30


@pytest.mark.slow
def test_attach_and_module(names: dict[str, Any]) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2500):
            optimizer.step()

    names |= {"optimizer": torch.optim.SGD(names["model"].parameters(), 0.1), "train": train}
    exec(block("docs/ema_recipes.md", "ema.attach("), names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {1000, 2000, 2500}
    exec(block("docs/ema_recipes.md", "ema.module("), names)
    assert torch.equal(names["averaged"].weight, names["ema"].average(0.1)["weight"])


def test_live_average(names: dict[str, Any]) -> None:
    names["loader"] = range(20)
    exec(block("docs/ema_recipes.md", "LiveEMA"), names)
    assert names["quality"] == 0.0


def test_weights_that_turned_nan(names: dict[str, Any]) -> None:
    model = names["model"]
    ema = names["ema"] = edm2.ema.PowerEMA(model)
    ema.update(1)
    ema.snapshot("snapshots")
    before = model.weight.clone()
    model.weight.data.fill_(float("nan"))
    ema.update(2)
    with pytest.raises(FloatingPointError):
        ema.snapshot("snapshots")
    exec(block("docs/ema_recipes.md", "load_snapshot"), names)
    assert torch.equal(model.weight, before)
    assert ema.t == 1


def test_applied_and_update_bn(names: dict[str, Any]) -> None:
    model = names["model"] = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    names["train_loader"] = [3 + torch.randn(8, 4) for _ in range(20)]
    ema = names["ema"] = edm2.ema.PowerEMA(model)
    for step in range(1, 11):
        train_step(model, torch.zeros(0))
        ema.update(step)
    ema.snapshot("snapshots")
    before = model[0].weight.clone()
    exec(block("docs/ema_recipes.md", "with ema.applied(model, 0.1):"), names)
    assert torch.equal(model[0].weight, before)
    exec(block("docs/ema_recipes.md", "update_bn"), names)
    inputs = torch.cat([model[0](x) for x in names["train_loader"]])
    assert torch.allclose(model[1].running_mean, inputs.mean(0), atol=1e-4)


@pytest.mark.slow
def test_other_profile(names: dict[str, Any]) -> None:
    ema = edm2.ema.PowerEMA(names["model"], plan="compact")
    for step in range(1000, 24_001, 1000):
        train_step(names["model"], torch.zeros(0))
        ema.update(step)
        ema.snapshot("snapshots")
    exec(block("docs/ema_recipes.md", "Target.uniform"), names)
    assert names["average"].t == 20_000


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_several_processes(names: dict[str, Any], tmp_path: Path) -> None:
    # Two processes are in sharded_worker.py; this is the text itself.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        exec(block("docs/ema_recipes.md", "DistributedDataParallel"), names)
    finally:
        torch.distributed.destroy_process_group()
    assert len(read_manifest("snapshots").snapshots) == 8
    state = torch.load("4000.pt", weights_only=True)
    assert state["ema"]["t"] == 4000
    assert set(state["model"]) == {"weight", "bias"}


def test_checkpoints(names: dict[str, Any]) -> None:
    Path("checkpoints").mkdir()
    for step in range(1000, 20_001, 1000):
        torch.save(nn.Linear(4, 4).state_dict(), f"checkpoints/{step}.pt")
    with pytest.warns(edm2.ema.AccuracyWarning):  # these weights have nothing to do with each other
        exec(block("docs/ema_recipes.md", "average_checkpoints"), names)
    assert isinstance(names["merged"], edm2.ema.Reconstruction)


@pytest.mark.slow
def test_training_by_hand(names: dict[str, Any]) -> None:
    (code,) = blocks("docs/training_by_hand.md")
    exec(code.replace("steps, batch_size = 600, 32", "steps, batch_size = 3, 8"), names)
    assert Path("digits.png").exists()
    assert names["samples"].isfinite().all()


@pytest.mark.slow
def test_condition_image(names: dict[str, Any]) -> None:
    for code in blocks("docs/condition_image.md"):
        exec(code, names)
    assert names["samples"].shape == (8, 3, 16, 16)
    assert all(p.grad is not None for p in names["denoiser"].unet.out_conv.parameters())


@pytest.fixture
def run(names: dict[str, Any], digits_run: Path) -> None:
    shutil.copytree(digits_run, "runs/digits")


@pytest.mark.usefixtures("run")
@pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")  # of a run of eight steps
def test_own_sampler(names: dict[str, Any]) -> None:
    for code in blocks("docs/own_sampler.md"):
        exec(code.replace("16_000", "32"), names)
    assert names["samples"].abs().max() < 1.5001
    assert names["images"].shape == (16, 1, 8, 8)
    coarse, middle, fine = names["errors"]
    assert 7.5 < coarse / middle < 8.5
    assert 7.5 < middle / fine < 8.5


@pytest.mark.usefixtures("run")
@pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")
@pytest.mark.parametrize("page", ["README.md", "docs/first_hour.md", "docs/own_images.md"])
def test_generator(page: str, names: dict[str, Any]) -> None:
    exec(block(page, "ImageGenerator.load").replace("runs/photos", "runs/digits"), names)
    assert len(names["images"]) == 16


@pytest.mark.filterwarnings(
    "ignore::edm2.ema.AccuracyWarning"
)  # of a walk that the two snapshots hardly know
def test_coming_from_another_library(names: dict[str, Any]) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(1000):
            optimizer.step()

    optimizer = torch.optim.SGD(names["model"].parameters(), 0.1)
    names |= {"optimizer": optimizer, "train": train, "inputs": torch.zeros(1, 4)}
    for code in blocks("docs/coming_from.md"):
        exec(code, names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {500, 1000}
    assert names["average"].sigma_rel == 0.15


def test_data_in_your_own_loop(names: dict[str, Any]) -> None:
    names |= {"x": torch.zeros(2, 3, 8, 8), "position": torch.arange(2), "seed": 0}
    exec(block("docs/data.md", "Augmentation"), names)
    assert names["label"].shape == (2, names["AUGMENT_DIM"])
    names |= {"num_images": 512, "rank": 1, "world_size": 2}
    exec(block("docs/data.md", "Batches").replace("pets64.zip", "digits").replace("...\n", "break\n"), names)
    assert names["position"] == 512 + 128
    assert names["images"].shape == (128, 1, 8, 8)


def test_a_transformation_of_your_own(names: dict[str, Any]) -> None:
    network = NetworkConfig(model_channels=8, channel_mult=(1,), num_blocks=1, channels_per_head=8)
    names["config"] = TrainConfig(num_images=16, batch_size=8, network=network, device="cpu")
    code = block("docs/data.md", "TransformedDataset")
    exec(code.replace("pets64.zip", "digits"), names)
    assert Path("runs/pets/model.safetensors").is_file()
    changed, same = names["dataset"], open_dataset("digits")
    assert changed.image_shape == same.image_shape
    assert not np.array_equal(changed.images(np.arange(4)), same.images(np.arange(4)))


def test_pairs(names: dict[str, Any]) -> None:
    np.save("coarse.npy", np.zeros((120, 3, 4, 4), np.float32))
    np.save("fine.npy", np.random.default_rng(0).normal(size=(120, 1, 8, 8)).astype(np.float32))
    exec(block("docs/pairs.md", "np.savez"), names)
    pairs, held_out = open_dataset("pairs.npz"), open_dataset("held_out.npz")
    assert (len(pairs), len(held_out)) == (20, 100)
    assert pairs.conditions is not None
    assert pairs.conditions.image_shape == (3, 4, 4)


@pytest.mark.slow
def test_a_configuration_by_letter(names: dict[str, Any]) -> None:
    exec(block("docs/ladder.md", "training_rules"), names)
    assert names["denoiser"].title.startswith("config C")
