"""A NaN in the weights stays in every average: it is reported, and there is a way back."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import LiveEMA, PowerEMA, reconstruct
from edm2.ema.maths.profiles import step_weight
from edm2.ema.tracking.averages import HostAverages


class Scaled(nn.Linear):
    """A layer with one parameter more."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.scale = nn.Parameter(torch.ones(1))


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def broken(last: int = 5, value: float = float("nan")) -> tuple[nn.Module, PowerEMA]:
    """A model whose second tensor was NaN at the last update, and is finite again."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    ema = PowerEMA(model, run_id="run")
    for step in range(1, last):
        moved(model)
        ema.update(step)
    with torch.no_grad():
        whole = model.bias[1].clone()
        model.bias[1] = value
        ema.update(last)
        model.bias[1] = whole
    return model, ema


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_update_says_so_within_a_hundred_updates(value: float) -> None:
    _, ema = broken(205, value)
    for step in range(206, 300):
        ema.update(step)
    message = (
        r"average of 'bias' is not finite \(1 of 2 tensors\): .* update after t 200, at t 300 at the latest"
    )
    with pytest.raises(FloatingPointError, match=message):
        ema.update(300)


def test_everything_that_gives_an_average_away_says_so(tmp_path: Path) -> None:
    model, ema = broken()
    for use in (
        ema.state_dict,
        lambda: ema.average(0.1),
        lambda: ema.average(0.07),
        lambda: ema.module(0.1),
        lambda: ema.write_to(model, 0.1),
        lambda: ema.snapshot(tmp_path / "snapshots"),
        lambda: ema.applied(model, 0.1).__enter__(),
    ):
        with pytest.raises(
            FloatingPointError, match=r"'bias' is not finite .*; go back to the last checkpoint"
        ):
            use()
    assert not (tmp_path / "snapshots").exists()


def test_a_state_with_nan_is_refused() -> None:
    model, _ = broken()
    state = PowerEMA(model).state_dict()
    state["offset.1.weight"] = torch.full((3, 3), float("nan"))
    state["offset.0.weight"] = torch.full((3, 3), float("nan"))
    with pytest.raises(FloatingPointError, match="average of 'weight' is not finite"):
        PowerEMA(model).load_state_dict(state)


def test_a_window_with_nan_is_noticed() -> None:
    model = nn.Linear(3, 3)
    ema = PowerEMA(model)
    ema.update(100_000)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    ema.update(100_001)
    assert ema._averages.parts()["offset.0"][0].isfinite().all()
    with pytest.raises(FloatingPointError, match="average of 'weight' is not finite"):
        ema.average(0.1)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_last_snapshot_is_the_way_back(tmp_path: Path, dtype: str) -> None:
    model = nn.Linear(3, 3)
    ema = PowerEMA(model, run_id="run", live=LiveEMA(inv_gamma=None))
    for step in range(1, 11):
        moved(model)
        ema.update(step)
        if step in (4, 8):
            ema.snapshot(tmp_path, dtype=dtype)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    ema.update(11)
    back = PowerEMA(model, live=LiveEMA(inv_gamma=None))
    back.load_snapshot(tmp_path)
    assert (back.run_id, back.t, back.steps) == ("run", 8, 8)
    for sigma_rel in (0.05, 0.1):
        stored = reconstruct(tmp_path, sigma_rel=sigma_rel).tensors
        assert all(torch.equal(x, stored[n]) for n, x in back.average(sigma_rel).items())
    back.write_to(model, 0.05)
    assert torch.equal(model.weight, back.average(0.05)["weight"])
    back.update(9)
    back.snapshot(tmp_path, dtype=dtype)
    assert reconstruct(tmp_path, sigma_rel=0.1).t == 9
    back.load_snapshot(tmp_path, t=4)
    assert back.t == 4


def test_a_snapshot_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    ema = PowerEMA(model, (0.1,))
    ema.update(3)
    ema.snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"no snapshot of sigma_rel 0.05 at t 3: .* EMA lengths \[0.1\]"):
        PowerEMA(model).load_snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"no snapshot of sigma_rel 0.1 at t 2: .*, and times \[3\]"):
        ema.load_snapshot(tmp_path, t=2)
    with pytest.raises(ValueError, match="counts 'steps', this tracker 'images'"):
        PowerEMA(model, (0.1,), clock="images").load_snapshot(tmp_path)
    with pytest.raises(ValueError, match="missing 'scale'"):
        PowerEMA(Scaled(3, 3), (0.1,)).load_snapshot(tmp_path)


def test_averages_in_host_memory_say_so_at_the_next_update() -> None:
    tensors = [torch.ones(3), torch.ones(2)]
    rule = partial(step_weight, gamma=3.0)
    host = HostAverages(tensors, ["a", "b"], [rule], start=0, dtype=torch.float32, windows=1024)
    for t in range(1, 201):
        tensors[1].fill_(float("nan") if t == 150 else 1.0)
        host.update(tensors, t)
    with pytest.raises(
        FloatingPointError, match=r"average of 'b' is not finite .* after t 100, at t 200 at the latest"
    ):
        host.update(tensors, 201)
