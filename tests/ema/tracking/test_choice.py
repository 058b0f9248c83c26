"""What is averaged and what is copied: buffers, names, complex and lazy parameters, dicts of tensors."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct


def drift(tensor: torch.Tensor, steps: int, ema: PowerEMA) -> torch.Tensor:
    """Move a tensor in place, update each time; returns the average at sigma_rel 0.1 by hand, in float64."""
    by_hand = PowerEMA({"w": (held := tensor.detach().clone())}, (0.1,), dtype=torch.float64)
    for step in range(1, steps + 1):
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
            held.copy_(tensor)
        ema.update(step)
        by_hand.update(step)
    return by_hand.average(0.1)["w"]


def test_buffers_are_averaged_on_request(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert "1.running_mean" not in PowerEMA(model).names
    ema = PowerEMA(model, average_buffers=True)
    assert {"1.running_mean", "1.running_var"} < set(ema.names)
    assert "1.num_batches_tracked" not in ema.names
    exact = drift(model[1].running_mean, 9, ema)
    ema.snapshot(tmp_path)
    result = reconstruct(tmp_path, sigma_rel=0.1).tensors
    torch.testing.assert_close(result["1.running_mean"].double(), exact, rtol=1e-6, atol=1e-7)
    model.load_state_dict(result)
    with ema.applied(model, 0.05):
        assert torch.equal(model[1].running_mean, ema.average(0.05)["1.running_mean"])


@pytest.mark.parametrize("copied", [["1.weight"], lambda name, tensor: name == "1.weight"])
def test_named_tensors_are_copied(tmp_path: Path, copied: object) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = PowerEMA(model, copied=copied)  # type: ignore[arg-type]
    assert "1.weight" not in ema.names
    drift(model[1].weight, 5, ema)
    ema.snapshot(tmp_path)
    assert torch.equal(reconstruct(tmp_path, sigma_rel=0.1).tensors["1.weight"], model[1].weight)
    assert torch.equal(ema.module(0.1)[1].weight, model[1].weight)


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"copied=\['wieght'\] are not tensors of the model: .* 'weight'"):
        PowerEMA(nn.Linear(2, 2), copied=["wieght"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_complex_parameters_are_averaged(tmp_path: Path, dtype: str) -> None:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    ema = PowerEMA(model)
    exact = drift(model.phase, 9, ema)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == "fp32" else {"rtol": 2e-3, "atol": 2e-3}
    assert ema.average(0.1)["phase"].dtype == torch.complex64
    torch.testing.assert_close(ema.average(0.1)["phase"], exact.to(torch.complex64), rtol=1e-6, atol=1e-6)
    assert torch.equal(*ema.average_on_first(0.1, ["phase"]), ema.average(0.1)["phase"])
    ema.snapshot(tmp_path, dtype=dtype)
    stored = reconstruct(tmp_path, sigma_rel=0.1).tensors
    torch.testing.assert_close(stored["phase"], exact.to(torch.complex64), **tolerance)
    model.load_state_dict(stored)
    with ema.applied(model, 0.05):
        assert torch.equal(model.phase, ema.average(0.05)["phase"])
    assert torch.equal(model.phase, stored["phase"])
    other = PowerEMA(model)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.average(0.05)["phase"], ema.average(0.05)["phase"])
    other.load_snapshot(tmp_path)
    assert torch.equal(other.average(0.1)["phase"], stored["phase"])


def test_lazy_modules_are_taken_up_at_the_first_update() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    ema = PowerEMA(model)
    with pytest.raises(
        ValueError, match=r"'0\.weight' is lazy and has no shape yet: give the model its tensors first"
    ):
        _ = ema.names
    with pytest.raises(ValueError, match="snapshot before the first update"):
        ema.snapshot("nowhere")
    model(torch.ones(2, 7))
    ema.update(1)
    assert ema.average(0.1)["0.weight"].shape == (4, 7)
    late = PowerEMA(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)))
    late._model(torch.ones(2, 7))  # type: ignore[operator]
    late.load_state_dict(ema.state_dict())
    assert torch.equal(late.average(0.1)["0.weight"], model[0].weight)


def test_dicts_and_lists_of_tensors_are_averaged(tmp_path: Path) -> None:
    tree = {"a": torch.randn(3), "b": {"c": [torch.randn(2), torch.arange(3)], "d": None}}
    ema = PowerEMA(tree)
    assert ema.names == ["a", "b.c.0"]
    exact = drift(tree["a"], 9, ema)  # type: ignore[arg-type]
    torch.testing.assert_close(ema.average(0.1)["a"].double(), exact, rtol=1e-6, atol=1e-7)
    tree["a"] = torch.zeros(3)  # a new tensor in its place, as functional code has it
    ema.update(10)
    ema.snapshot(tmp_path)
    result = reconstruct(tmp_path, sigma_rel=0.1).tensors
    assert sorted(result) == ["a", "b.c.0", "b.c.1"]
    with ema.applied(tree, 0.1):
        assert torch.equal(tree["a"], result["a"])  # type: ignore[arg-type]
    assert torch.equal(tree["a"], torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module\(\) copies a whole module"):
        ema.module(0.1)
    with pytest.raises(ValueError, match=r"holds a str at 'b': give a module, or dicts, lists, tuples"):
        PowerEMA({"a": torch.ones(1), "b": "text"})


def test_a_nested_tree_of_parameters_is_averaged_like_the_module_it_is_for(tmp_path: Path) -> None:
    """Functional code keeps parameters in dicts of dicts and lists, and makes new tensors at every step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    layers = [{k: x.detach().clone() for k, x in model[i].named_parameters()} for i in (0, 2)]
    tree = {"net": {"layers": layers, "scale": [[torch.ones(2)]]}, "count": torch.tensor(0)}
    of_tree, of_model = PowerEMA(tree, run_id="tree"), PowerEMA(model)
    assert of_tree.names == [
        "net.layers.0.weight", "net.layers.0.bias", "net.layers.1.weight", "net.layers.1.bias",
        "net.scale.0.0",
    ]  # fmt: skip
    for t in range(1, 20):
        for i, layer in ((0, layers[0]), (2, layers[1])):
            for name, x in layer.items():
                layer[name] = x * 0.9 + 0.1
                model[i].get_parameter(name).data.copy_(layer[name])
        tree["count"] = torch.tensor(t)
        of_tree.update(t)
        of_model.update(t)
    of_tree.snapshot(tmp_path)
    found, wanted = reconstruct(tmp_path, sigma_rel=0.1).tensors, of_model.average(0.1)
    for old, new in (("0", "net.layers.0"), ("2", "net.layers.1")):
        for name in ("weight", "bias"):
            assert torch.equal(found[f"{new}.{name}"], wanted[f"{old}.{name}"])
    assert int(found["count"]) == 19
    resumed = PowerEMA(tree, run_id="other")
    resumed.load_state_dict(of_tree.state_dict())
    resumed.write_to(tree, 0.1)
    assert torch.equal(layers[0]["weight"], wanted["0.weight"])


class Pair(NamedTuple):
    scale: torch.Tensor
    shift: torch.Tensor


@dataclasses.dataclass
class Head:
    weights: tuple[torch.Tensor, ...]
    unused: None = None


def test_trees_of_tuples_dataclasses_and_modules_that_are_made_anew_at_every_step(tmp_path: Path) -> None:
    def made(t: int) -> dict[str, Any]:
        value = torch.full((3,), float(t))
        return {"pair": Pair(value, 2 * value), "heads": [Head((3 * value, 4 * value)), (5 * value,)]}

    module = nn.Linear(2, 1)
    tree = {"net": made(0), "module": module}
    ema, twin = PowerEMA(tree, run_id="tree"), PowerEMA({"x": (x := torch.zeros(3))})
    assert ema.names == [
        "net.pair.scale", "net.pair.shift", "net.heads.0.weights.0", "net.heads.0.weights.1", "net.heads.1.0",
        "module.weight", "module.bias",
    ]  # fmt: skip
    for t in range(1, 30):
        tree["net"] = made(t)  # what functional code does
        x.fill_(t)
        ema.update(t)
        twin.update(t)
    ema.snapshot(tmp_path)
    wanted = twin.average(0.1)["x"]
    for factor, name in enumerate(ema.names[:5], start=1):
        torch.testing.assert_close(ema.average(0.1)[name], factor * wanted)
        torch.testing.assert_close(reconstruct(tmp_path, sigma_rel=0.1).tensors[name], factor * wanted)
    with ema.applied(tree, 0.1):
        torch.testing.assert_close(tree["net"]["pair"].shift, 2 * wanted)
    assert torch.equal(tree["net"]["pair"].shift, torch.full((3,), 58.0))
    tree["net"] = {"pair": Pair(x, "text")}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'net.pair.shift' is a str now"):
        ema.update(30)
    tree["net"] = 3
    with pytest.raises(ValueError, match=r"tensor 'net.pair.scale' is no longer in the model"):
        ema.update(30)


def test_averages_follow_a_model_to_another_type() -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 5), nn.Linear(5, 5)
    twin.load_state_dict(model.state_dict())
    ema, same = PowerEMA(model, (0.1,)), PowerEMA(twin, (0.1,))
    for step in [*range(1, 4), *range(100_000, 100_004)]:
        if step in (3, 100_002):
            model.to(torch.float64 if step == 3 else torch.float32)
        for module in (model, twin):
            with torch.no_grad():
                module.weight.add_(step % 7 / 8)
        ema.update(step)
        same.update(step)
    torch.testing.assert_close(ema.average(0.1)["weight"], same.average(0.1)["weight"], rtol=1e-6, atol=1e-6)
    assert any(key.startswith("window.") for key in ema.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_averages_follow_a_model_to_a_gpu_and_back(device: str | None) -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 5), nn.Linear(5, 5)
    twin.load_state_dict(model.state_dict())
    ema, same = PowerEMA(model, device=device), PowerEMA(twin)
    for step in [*range(1, 7), *range(100_000, 100_300)]:
        if step in (3, 5, 100_002, 100_150):
            model.to("cuda" if step in (3, 100_002) else "cpu")
        for module in (model, twin):
            with torch.no_grad():
                module.weight.add_(step % 7 / 8)
        ema.update(step)
        same.update(step)
    torch.testing.assert_close(ema.average(0.1)["weight"], same.average(0.1)["weight"], rtol=1e-6, atol=1e-6)
    model.cuda()
    ema.update(200_000)
    assert ema.average(0.1)["weight"].device.type == (device or "cuda")
