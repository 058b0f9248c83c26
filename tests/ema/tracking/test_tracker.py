"""The tracker against sums done by hand in float64."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, sigma_rel_to_gamma


def walk(model: nn.Module, times: list[float], seed: int = 0) -> Iterator[float]:
    """Move a model's parameters by random steps, one a time."""
    generator = torch.Generator().manual_seed(seed)
    for t in times:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        yield t


def exact(
    history: list[torch.Tensor], times: list[float], sigma_rel: float, start: float = 0
) -> torch.Tensor:
    """The weighted sum that the average stands for: each weight vector counts for its interval's mass."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    edges = (np.array([start, *times]) - start) / (times[-1] - start)
    masses = np.diff(edges ** (gamma + 1))
    return sum(m * h for m, h in zip(masses, history, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "times",
    [list(range(1, 301)), list(range(10, 3001, 10)), [1, 2, 5, 6, 50, 51, 52.5, 400, 401], [1e9, 3e9, 3.5e9]],
)
@pytest.mark.parametrize("widths", [(0.05, 0.1, 0.25), (0.1,)])
def test_average_is_exact_at_any_interval(times: list[float], widths: tuple[float, ...]) -> None:
    model = nn.Linear(7, 5)
    ema = PowerEMA(model, widths)
    history = []
    for t in walk(model, times):
        ema.update(t)
        history.append(model.weight.detach().double().clone())
    for sigma_rel in widths:
        truth = exact(history, times, sigma_rel)
        error = (ema.average(sigma_rel)["weight"] - truth).norm() / truth.norm()
        assert error < 1e-6


def test_time_counts_from_start_when_fine_tuning() -> None:
    model = nn.Linear(3, 2)
    ema = PowerEMA(model, (0.1,), start=1000)
    times = [1010.0, 1030.0, 1100.0]
    history = []
    for t in walk(model, times):
        ema.update(t)
        history.append(model.weight.detach().double().clone())
    torch.testing.assert_close(
        ema.average(0.1)["weight"].double(), exact(history, times, 0.1, start=1000), rtol=1e-6, atol=1e-7
    )


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    model = nn.Linear(64, 64).bfloat16()
    ema = PowerEMA(model, (0.1,))
    times = list(range(1, 101))
    history = []
    for t in walk(model, times):
        ema.update(t)
        history.append(model.weight.detach().double().clone())
    truth = exact(history, times, 0.1)
    assert ema.average(0.1)["weight"].dtype == torch.float32
    assert (ema.average(0.1)["weight"] - truth).norm() / truth.norm() < 1e-6


def test_state_dict_round_trip_is_exact() -> None:
    model, twin = nn.Linear(7, 5), nn.Linear(7, 5)
    twin.load_state_dict(model.state_dict())
    ema, other = PowerEMA(model), PowerEMA(twin)
    for t in walk(model, list(range(1, 20))):
        ema.update(t)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in ema.state_dict().items()}
    other.load_state_dict(state)
    twin.load_state_dict(model.state_dict())
    for t in walk(model, list(range(20, 30)), seed=1):
        ema.update(t)
    for t in walk(twin, list(range(20, 30)), seed=1):
        other.update(t)
    assert other.run_id == ema.run_id
    for key, value in ema.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) if isinstance(value, torch.Tensor) else True


def test_state_dict_of_other_settings_or_another_model_is_refused() -> None:
    ema = PowerEMA(nn.Linear(7, 5))
    with pytest.raises(ValueError, match="sigma_rels is"):
        ema.load_state_dict(PowerEMA(nn.Linear(7, 5), (0.05,)).state_dict())
    with pytest.raises(ValueError, match="clock is 'images'"):
        ema.load_state_dict(PowerEMA(nn.Linear(7, 5), clock="images").state_dict())
    with pytest.raises(ValueError, match="another model"):
        ema.load_state_dict(PowerEMA(nn.Linear(7, 6)).state_dict())


def test_time_must_increase() -> None:
    ema = PowerEMA(nn.Linear(2, 2))
    ema.update(5)
    for t in (5, 4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="t must increase"):
            ema.update(t)


def test_a_changed_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ema = PowerEMA(model)
    ema.update(1)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"'0.weight' changed from shape \(2, 2\) to \(3, 2\)"):
        ema.update(2)
    del model[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' is no longer in the model"):
        ema.update(2)


def test_a_replaced_module_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = PowerEMA(model)
    ema.update(1)
    ema.snapshot(tmp_path)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))  # found anew: it is the module that is held
    ema.update(2)
    ema.snapshot(tmp_path)
    for index, layer, name in ((1, nn.BatchNorm1d(2), "1.weight"), (0, nn.Linear(2, 2), "0.weight")):
        model[index] = layer
        message = f"tensor '{name}' in the model is not the tracked one: its module was replaced"
        with pytest.raises(ValueError, match=message):
            ema.snapshot(tmp_path)
        with pytest.raises(ValueError, match=message), ema.applied(model, 0.1):
            pass
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"missing none, unexpected '2.bias', '2.weight'"):
        ema.snapshot(tmp_path)


def test_a_state_that_is_not_whole_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    ema, other = PowerEMA(model, (0.1, 0.2), run_id="one"), PowerEMA(model, (0.1, 0.2), run_id="two")
    other.update(7)
    whole = other.state_dict()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(5)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in ema.state_dict().items()}
    for key in ("run_id", "start", "t", "steps", "updates", "format", "clock", "sigma_rels", "offset.0.bias"):
        for value in (None, float("nan"), ()):
            with pytest.raises(ValueError, match=f"(is missing or wrong|the state's {key} is|'{key}')"):
                ema.load_state_dict({**whole, key: value})
            with pytest.raises(ValueError, match=r"(is missing or wrong|the state's|of another model)"):
                ema.load_state_dict({k: v for k, v in whole.items() if k != key})
    for key, value in ema.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]
    ema.load_state_dict(whole)
    assert (ema.run_id, ema.t) == ("two", 7)


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="one or more different EMA lengths"):
        PowerEMA(nn.Linear(2, 2), (0.1, 0.1))


def test_any_width_between_the_tracks_is_at_hand() -> None:
    model = nn.Linear(30, 30)
    ema = PowerEMA(model, (0.023, 0.044, 0.063, 0.122, 0.196, 0.244))
    truth = PowerEMA(model, (0.08, 0.16), dtype=torch.float64)
    for t in walk(model, list(range(1, 200))):
        ema.update(t)
        truth.update(t)
    for sigma_rel in truth.sigma_rels:
        exact = truth.average(sigma_rel)["weight"]
        assert (ema.average(sigma_rel)["weight"] - exact).norm() / (model.weight - exact).norm() < 0.01
        with ema.applied(model, sigma_rel):
            assert torch.equal(model.weight, ema.average(sigma_rel)["weight"])
    with pytest.raises(
        ValueError, match=r"sigma_rel 0\.25 cannot be made from the tracked ones, \(0\.05, 0\.1\)"
    ):
        PowerEMA(model).average(0.25)


def test_applied_swaps_weights_in_and_surely_back() -> None:
    model = nn.Linear(7, 5)
    ema = PowerEMA(model)
    for t in walk(model, [1, 2, 3]):
        ema.update(t)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.applied(model, 0.1) as swapped:
        assert swapped is model
        assert torch.equal(model.weight, ema.average(0.1)["weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model, 0.05):
        raise RuntimeError("inside")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with (
        pytest.raises(ValueError, match=r"missing 'bias', 'weight', unexpected '0\.bias', '0\.weight'"),
        ema.applied(nn.Sequential(nn.Linear(7, 5)), 0.1),
    ):
        pass


class Pair(nn.Module):
    """Two layers, in either order of registration."""

    def __init__(self, *names: str, width: int = 3) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width))


def test_applied_pairs_tensors_by_name() -> None:
    model, other = Pair("a", "b"), Pair("b", "a")
    ema = PowerEMA(model)
    ema.update(1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with ema.applied(other, 0.1):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())
    swapped = Pair("a", "b", width=1)
    before = {k: v.clone() for k, v in swapped.state_dict().items()}
    with (
        pytest.raises(ValueError, match=r"'a.weight' has shape \(1, 1\) in the model, its average \(3, 3\)"),
        ema.applied(swapped, 0.1),
    ):
        pass
    assert all(torch.equal(v, swapped.state_dict()[k]) for k, v in before.items())


def test_subset_leaves_the_rest_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = PowerEMA(model, include=lambda name, tensor: tensor.requires_grad)
    assert ema.names == ["1.weight", "1.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match="no floating-point parameter was chosen"):
        PowerEMA(model, include=lambda name, tensor: False)


def test_meta_tensors_and_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        PowerEMA(nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="device 'cuda:7' is not known"):
        PowerEMA(nn.Linear(1, 1), device="cuda:7")


def test_a_buffer_of_a_type_that_files_cannot_hold_is_refused() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("scale", torch.zeros(1).to(torch.float8_e4m3fnuz))
    with pytest.raises(
        ValueError, match=r"'scale' is of type torch.float8_e4m3fnuz, which snapshots cannot hold"
    ):
        PowerEMA(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_a_coarse_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="is too coarse for averages"):
        PowerEMA(nn.Linear(1, 1), dtype=dtype)


def test_update_allocates_nothing_once_it_runs() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 64).bfloat16())
    ema = PowerEMA(model)
    for t in range(1, 5):
        ema.update(t)
    with torch.profiler.profile(profile_memory=True) as profile:
        for t in range(5, 70):
            ema.update(t)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1024


def test_model_is_never_copied_and_each_tensor_is_averaged_once() -> None:
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: object) -> "Uncopyable":
            raise AssertionError("copied")

    model = nn.ModuleDict({"embedding": Uncopyable(4, 3), "head": nn.Linear(4, 3, bias=False)})
    model["head"].weight = model["embedding"].weight
    ema = PowerEMA(model)
    for t in walk(model, [1, 2]):
        ema.update(t)
    assert ema.names == ["embedding.weight", "embedding.bias"]
    with ema.applied(model, 0.1):
        assert model["head"].weight is model["embedding"].weight


def test_time_may_be_a_tensor_and_the_optimiser_may_replace_the_weights_data() -> None:
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    ema, other = PowerEMA(model), PowerEMA(twin)
    for step in range(1, 4):
        new = torch.full((2, 3), float(step))
        model.weight.data = new.clone()
        twin.weight = nn.Parameter(new.clone())
        ema.update(torch.tensor(step))  # type: ignore[arg-type]
        other.update(step)
    assert torch.equal(ema.average(0.1)["weight"], other.average(0.1)["weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_update_on_a_gpu_never_waits_for_it(device: str | None) -> None:
    model = nn.Linear(64, 64).cuda()
    ema = PowerEMA(model, device=device)
    ema.update(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ema.average(0.1)["weight"].device.type == (device or "cuda")
