"""Starting from weights: the same bits where the network is the same, no effect of what is new, errors elsewhere."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data, tiny_network
from torch import Tensor

from edm2.diffusion import Denoiser, build_denoiser, load_model, read_model_header, save_model
from edm2.ema import reconstruct
from edm2.train import LossConfig, Stopped, Trainer, train
from edm2.train.initial import take_over
from edm2.train.run_folder import SNAPSHOTS

LICENCE = {"license": "cc-by-nc-sa-4.0", "license_notice": "not for commerce"}


def make(label_dim: int = 3, size: int = 4, **options: Any) -> Denoiser:
    """A network with the shape of the tiny run, and weights that all have an effect."""
    given: dict[str, Any] = {
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "channels_per_head": 8,
    }
    made = build_denoiser(size, 1, label_dim, **{**given, "attn_resolutions": (), **options}).eval()
    torch.manual_seed(0)
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


def saved(path: Path, denoiser: Denoiser, **info: Any) -> str:
    return str(save_model(path, denoiser.options, denoiser.state_dict(), info))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return saved(tmp_path / "model.safetensors", make(), **LICENCE)


def test_step_0_is_the_model_bit_for_bit(model: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(init=model, channels_last=False), tiny_data(), tmp_path / "run")
    expected = load_model(model)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.denoiser.state_dict().items())
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        outputs = [d.eval()(x, sigma, torch.tensor([0, 2])) for d in (trainer.denoiser, load_model(model)[0])]
    assert torch.equal(*outputs)
    assert trainer.num_images == 0


def test_a_finished_run_is_a_start_and_the_averages_begin_anew(tmp_path: Path) -> None:
    train(tiny_config(num_images=80), tmp_path / "a", dataset=tiny_data(), quiet=True)
    config = tiny_config(num_images=80, snapshot_images=8, init=str(tmp_path / "a"), seed=1)
    train(config, tmp_path / "b", dataset=tiny_data(), quiet=True)
    # A power average forgets its start: after one step it is the weights of that step.
    first = reconstruct(tmp_path / "b" / SNAPSHOTS, 0.1, t=8)
    assert first.t == 8
    initial = load_model(tmp_path / "a")[0].state_dict()
    moved = max(float((first.tensors[name] - initial[name]).abs().max()) for name in first.tensors)
    assert 0 < moved < 0.2


def test_the_licence_travels(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    final = train(tiny_config(num_images=8, init=model), run, dataset=tiny_data(), quiet=True)
    info = read_model_header(final)[1]["info"]
    assert LICENCE.items() <= info.items()
    assert LICENCE.items() <= reconstruct(run / SNAPSHOTS, 0.1).metadata["info"].items()  # type: ignore[index,union-attr]


def stopped_at(out: Path, stop: int | None = None, **changes: Any) -> None:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == stop:
            trainer.request_stop()

    train(tiny_config(**changes), out, dataset=tiny_data(), quiet=True, on_step=on_step)


def test_a_run_continues_without_the_file_it_started_from(model: str, tmp_path: Path) -> None:
    stopped_at(tmp_path / "whole", init=model)
    with pytest.raises(Stopped):
        stopped_at(tmp_path / "parts", 72, init=model)
    Path(model).unlink()
    stopped_at(tmp_path / "parts", init=model)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_the_start_is_part_of_the_run_by_content(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(tiny_config(init=model), tiny_data(), run)
    copy = str(shutil.copy(model, tmp_path / "copy.safetensors"))
    Trainer(tiny_config(init=copy), tiny_data(), run)
    other = make()
    torch.nn.init.ones_(other.unet.out_gain)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds another run \(init.sha256 .* there, .* here\)"):
        Trainer(tiny_config(init=saved(tmp_path / "other.safetensors", other, **LICENCE)), tiny_data(), run)
    with pytest.raises(ValueError, match=r"holds another run \(init.license .* there, None here"):
        Trainer(tiny_config(), tiny_data(), run)
    Path(copy).unlink()
    with pytest.raises(
        ValueError, match=r"copy.safetensors does not exist"
    ):  # no checkpoint holds its weights yet
        Trainer(tiny_config(init=copy), tiny_data(), run)


def test_a_run_without_a_start_has_the_name_that_it_always_had() -> None:
    assert "init" not in tiny_config().identity()
    assert tiny_config(init="x").run_id("x") == tiny_config().run_id("x")
    assert tiny_config().run_id("x", {"init": {"sha256": "1"}}) != tiny_config().run_id("x")


def taken(source: Denoiser, target: Denoiser, tmp_path: Path, told: str) -> None:
    path = saved(tmp_path / "source.safetensors", source)
    with pytest.warns(UserWarning, match=told):
        take_over(target, path)


X, SIGMA = (
    torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0.1, 0.5, 2.0, 9.0]),
)


def output(denoiser: Denoiser, labels: Tensor | None, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = denoiser.eval()(X, SIGMA, labels, **options)
    return result


@pytest.mark.parametrize("config", "ABCDEFG")
def test_new_channels_of_a_condition_have_no_effect(config: str, tmp_path: Path) -> None:
    source, target = make(config=config), make(config=config, cond_channels=2)
    labels = torch.tensor([0, 1, 2, 0])
    taken(source, target, tmp_path, "channels of its condition, 2 more start without effect")
    found = output(target, labels, condition=torch.randn(4, 2, 4, 4))
    torch.testing.assert_close(found, output(source, labels), rtol=1e-5, atol=1e-5)
    # The channels learn from the first step on.
    target(X, SIGMA, labels, condition=torch.randn(4, 2, 4, 4)).square().sum().backward()
    first = next(iter(target.unet.enc.values()))  # type: ignore[union-attr,operator,arg-type]
    assert first.weight.grad[:, 1:3].abs().max() > 0


@pytest.mark.parametrize("config", "ABCDEFG")
def test_new_classes_start_at_random_and_leave_the_others_alone(config: str, tmp_path: Path) -> None:
    source, target = make(config=config), make(5, config=config)
    fresh = target.state_dict()["unet.emb_label.weight"][:, 3:].clone()
    taken(source, target, tmp_path, "entries of its labels, 2 more start at random")
    old = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(output(target, old), output(source, old), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(target, None), output(source, None))
    first, second = (output(target, torch.full((4,), label)) for label in (3, 4))
    assert (first - second).abs().max() > 1e-3
    found, before = (d.state_dict()["unet.emb_label.weight"] for d in (target, source))
    if config in "ABC":
        assert torch.equal(found[:, 3:], fresh)
    else:  # of the size of the others
        torch.testing.assert_close(found.square().mean(1), before.square().mean(1))


def test_entries_of_a_vector_start_without_effect(tmp_path: Path) -> None:
    source, target = make(2, label_kind="vector"), make(3, label_kind="vector")
    taken(source, target, tmp_path, "entries of its labels, 1 more start without effect")
    vectors = torch.randn(4, 3)
    torch.testing.assert_close(output(target, vectors), output(source, vectors[:, :2].contiguous()))


def test_parts_that_only_one_network_has_are_listed(tmp_path: Path) -> None:
    taken(make(), make(0), tmp_path, "unet.emb_label.weight has no place in this network")
    shutil.rmtree(tmp_path)
    taken(make(0), make(), tmp_path, "unet.emb_label.weight is not in it and starts at random")
    shutil.rmtree(tmp_path)
    taken(make(), make(augment_dim=9), tmp_path, "unet.emb_augment.weight is not in it")
    shutil.rmtree(tmp_path)
    taken(make(5), make(), tmp_path, "entries of its labels, 2 are left out")


def test_another_resolution_takes_everything(tmp_path: Path) -> None:
    options = {"channel_mult": [1, 2]}
    source, target = make(size=4, **options), make(size=8, **options)
    take_over(target, saved(tmp_path / "source.safetensors", source))
    theirs = list(source.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), theirs, strict=True))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_channels": 16}, "model_channels 16 there, 8 here"),
        ({"num_blocks": 2}, "num_blocks 2 there, 1 here"),
        ({"channels_per_head": 4}, "channels_per_head 4 there, 8 here"),
        ({"config": "D"}, "config D there, G here"),
        ({"res_balance": 0.4}, "res_balance 0.4 there, 0.3 here"),
        ({"sigma_data": 1.0}, "sigma_data 1.0 there, 0.5 here"),
        ({"attn_resolutions": (4,)}, "it has unet.enc.4x4_block0.*, which this network lacks"),
    ],
)
def test_a_network_that_cannot_fit(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "source.safetensors", make(**changes))
    with pytest.raises(ValueError, match=f"do not fit this network .*{told}.*--settings"):
        Trainer(tiny_config(init=path), tiny_data(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attention_that_the_model_lacks(tmp_path: Path) -> None:
    path = saved(tmp_path / "source.safetensors", make())
    with pytest.raises(ValueError, match=r"its unet.enc.4x4_block0.* is missing or of another shape"):
        take_over(make(attn_resolutions=(4,)), path)


def test_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"")
    for path, told in (("x.pkl", "edm2 import"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=told):
            Trainer(tiny_config(init=str(tmp_path / path)), tiny_data(), tmp_path / "run")


def test_sizes_and_rates_may_change(model: str, tmp_path: Path) -> None:
    """What is not part of the network's function is the new run's own."""
    config = tiny_config(
        init=model, network=tiny_network(dropout=0.4), batch_size=4, loss=LossConfig(p_mean=0.5)
    )
    stopped_at(tmp_path / "run", **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
