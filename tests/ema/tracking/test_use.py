"""Averages in use while a model trains: attached to an optimiser, as modules, written back, live."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import LiveEMA, PowerEMA, reconstruct
from edm2.ema.storage.manifest import read_manifest


class Net(nn.Module):
    """A model with a method, a buffer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.head(self.embed(x)))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self(x)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(torch.randn(8, 3)) - 1).square().mean().backward()
    optimizer.step()


def train(ema: PowerEMA, model: nn.Module, steps: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        step(model, optimizer)
        ema.update(ema.t + 1)


@pytest.mark.parametrize("every", [1, 3])
def test_attached_averages_are_those_updated_by_hand(tmp_path: Path, every: int) -> None:
    model = Net()
    attached, by_hand = PowerEMA(model), PowerEMA(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    hook = attached.attach(optimizer, every, snapshot_every=6, folder=tmp_path, dtype="bf16")
    for t in range(1, 14):
        step(model, optimizer)
        if t % every == 0:
            by_hand.update(t)
    hook.finish()
    if every > 1:
        by_hand.update(13)
    assert attached.t == attached.steps == 13
    for name, value in by_hand.average(0.1).items():
        assert torch.equal(attached.average(0.1)[name], value)
    snapshots = read_manifest(tmp_path).snapshots
    assert sorted({s.t for s in snapshots}) == [6, 12, 13]
    assert {s.dtype for s in snapshots} == {"bf16"}
    step(model, optimizer)
    assert attached.steps == 13


def test_attached_averages_resume_exactly_with_the_optimisers_state() -> None:
    model = Net()
    ema = PowerEMA(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    ema.attach(optimizer, every=4)
    for _ in range(6):
        step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ema.state_dict()))
    twin = Net()
    other = PowerEMA(twin)
    again = torch.optim.Adam(twin.parameters(), 0.01)
    other.attach(again, every=4)
    twin.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert other.steps == 6
    for pair in ((model, optimizer), (twin, again)):
        torch.manual_seed(7)
        for _ in range(7):
            step(*pair)
    assert ema.t == other.t == 12
    for name, value in ema.average(0.1).items():
        assert torch.equal(other.average(0.1)[name], value)


def test_averages_that_were_updated_by_hand_go_on_attached() -> None:
    model = Net()
    ema = PowerEMA(model)
    train(ema, model, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema.attach(optimizer, every=2)
    for _ in range(3):
        step(model, optimizer)
    assert (ema.t, ema.steps) == (8, 8)


def test_a_clock_tells_the_time_and_a_wrapped_optimiser_is_found() -> None:
    class Wrapped(torch.optim.Optimizer):
        """As Accelerate has it: never initialised, and the real one inside."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: None = None) -> None:
            self.optimizer.step()

    model = Net()
    ema = PowerEMA(model, clock="images", start=1000)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    images = 1000
    hook = ema.attach(Wrapped(inner), clock=lambda: images)
    for _ in range(3):
        images += 8
        step(model, inner)
    assert ema.t == images
    hook.remove()
    step(model, inner)
    assert ema.t == images


def test_what_attach_refuses(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        PowerEMA(model).attach(optimizer, every=0)
    with pytest.raises(ValueError, match="snapshot_every and folder go together"):
        PowerEMA(model).attach(optimizer, folder=tmp_path)
    with pytest.raises(ValueError, match="interval between snapshots must be above 0, got -1"):
        PowerEMA(model).snapshot_every(-1, tmp_path)


def test_snapshots_come_by_themselves(tmp_path: Path) -> None:
    model = Net()
    ema = PowerEMA(model, start=100)
    ema.snapshot_every(10, tmp_path, keep=6)
    for t in (103, 109, 111, 119, 145, 149, 150, 161):
        ema.update(t)
    assert {s.t for s in read_manifest(tmp_path).snapshots} <= {111, 145, 150, 161}
    assert len(read_manifest(tmp_path).snapshots) == 6


def test_a_module_is_a_copy_in_evaluation_mode_that_is_refreshed() -> None:
    model = Net()
    ema = PowerEMA(nn.DataParallel(model), live=LiveEMA())
    train(ema, model, 5)
    made = ema.module(0.1)
    assert isinstance(made, Net)
    assert not made.training
    assert model.training
    assert made.head.weight is made.embed.weight
    assert not any(p.requires_grad for p in made.parameters())
    x = torch.randn(4, 3)
    with ema.applied(model, 0.1):
        model.eval()
        expected = model.sample(x)
        model.train()
    assert torch.equal(made.sample(x), expected)
    train(ema, model, 3)
    assert torch.equal(ema.module(0.1, refresh=False).sample(x), expected)
    assert ema.module(0.1) is made
    assert torch.equal(made.embed.weight, ema.average(0.1)["embed.weight"])
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)
    assert torch.equal(ema.module("live").embed.weight, ema.average("live")["embed.weight"])


def test_an_average_is_written_back_and_recorded(tmp_path: Path) -> None:
    model = Net()
    ema = PowerEMA(model, run_id="run")
    train(ema, model, 5)
    average, weights = ema.average(0.1), model.embed.weight.clone()
    ema.write_to(model, 0.1, keep=0.75)
    torch.testing.assert_close(model.embed.weight, 0.75 * weights + 0.25 * average["embed.weight"])
    ema.write_to(model, 0.1)
    assert torch.equal(model.embed.weight, average["embed.weight"])
    other = Net()
    ema.write_to(other, 0.05)
    assert torch.equal(other.embed.weight, ema.average(0.05)["embed.weight"])
    train(ema, model, 2)
    ema.snapshot(tmp_path)
    record = ({"t": 5, "sigma_rel": 0.1, "keep": 0.75}, {"t": 5, "sigma_rel": 0.1, "keep": 0.0})
    assert reconstruct(tmp_path, sigma_rel=0.1).write_backs == record
    resumed = PowerEMA(model)
    resumed.load_state_dict(ema.state_dict())
    resumed.update(8)
    resumed.snapshot(tmp_path)
    assert reconstruct(tmp_path, sigma_rel=0.1).write_backs == record
    assert reconstruct(tmp_path, sigma_rel=0.1, t=7).write_backs == record
    with pytest.raises(ValueError, match=r"keep 1 must be in \[0, 1\)"):
        ema.write_to(model, 0.1, keep=1)


def live_by_hand(weights: list[torch.Tensor], decays: list[float]) -> torch.Tensor:
    average = weights[0].double()
    for weight, decay in zip(weights, decays, strict=True):
        average = decay * average + (1 - decay) * weight.double()
    return average


@pytest.mark.parametrize(
    ("live", "decays"),
    [
        (LiveEMA(beta=0.9, inv_gamma=None), [0.0] + 29 * [0.9]),
        (
            LiveEMA(beta=0.8, update_after_step=4, inv_gamma=2.0, power=0.75, min_value=0.1),
            5 * [0.0] + [min(max(1 - (1 + k / 2) ** -0.75, 0.1), 0.8) for k in range(1, 26)],
        ),
    ],
)
def test_the_live_average_is_that_of_other_libraries(live: LiveEMA, decays: list[float]) -> None:
    model = Net()
    ema = PowerEMA(model, live=live)
    weights = []
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for t in range(1, 31):
        step(model, optimizer)
        ema.update(t)
        weights.append(model.embed.weight.detach().clone())
        if t == 12:
            resumed = PowerEMA(model, live=live)
            resumed.load_state_dict(ema.state_dict())
            ema = resumed
    exact = live_by_hand(weights, decays)
    torch.testing.assert_close(ema.average("live")["embed.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    with ema.applied(model, "live"):
        assert torch.equal(model.embed.weight, ema.average("live")["embed.weight"])


def test_updates_that_come_every_few_steps_apply_the_decay_of_all_of_them() -> None:
    live = LiveEMA(beta=0.9, inv_gamma=None)
    assert live.share(50, 10) == pytest.approx(1 - 0.9**10)
    assert live.share(1, 1) == 1.0


def test_bad_live_averages_are_refused() -> None:
    with pytest.raises(ValueError, match="min_value 0 and beta 1 must satisfy"):
        LiveEMA(beta=1.0)
    with pytest.raises(ValueError, match=r"inv_gamma 0 and power 0\.5 must be above 0: inv_gamma=None"):
        LiveEMA(inv_gamma=0.0, power=0.5)
    model = Net()
    ema = PowerEMA(model)
    ema.update(1)
    with pytest.raises(ValueError, match="no live average is tracked"):
        ema.average("live")
    with pytest.raises(ValueError, match=r"the state's live is None, this tracker's is \{'beta'"):
        PowerEMA(model, live=LiveEMA()).load_state_dict(ema.state_dict())
