"""Long runs, in which one update is less than float32's rounding: averages go on moving, by way of windows."""

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct, sigma_rel_to_gamma
from edm2.ema.maths.profiles import step_weight
from edm2.ema.storage.encoding import arithmetic_rounding
from edm2.ema.tracking.averages import Averages, HostAverages, windows_per_run

MANY = (0.02, 0.05, 0.1, 0.25, 0.28)
WIDTHS = (0.03, 0.05, 0.1, 0.25)
# Far into training, so that a window opens at the second update and holds five, a plain mean, or 132, offsets.
LATE = [90_000, *range(90_010, 90_260, 10)]
LATER = [5_400_000, *range(5_400_010, 5_401_330, 10)]


def paths(steps: int, period: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows at the start, their drift over the run, and noise that repeats."""
    rng = np.random.default_rng(0)
    base, direction = rng.standard_normal((2, size))
    noise = rng.standard_normal((period, size))
    drifts, noises = (0, 1e-5, 1e-3, 1e-2, 1e-1), (1e-3, 0, 1e-4, 0, 0)
    start = np.stack([np.ones(size), *[base] * 4])
    return start, np.stack([d * direction for d in drifts]), np.stack([n * noise for n in noises], axis=1)


@pytest.mark.parametrize(
    ("steps", "widths"),
    [
        (1000, MANY), (10_000, MANY), (50_000, MANY), (1000, (0.25,)), (4000, (0.05,)), (18_000, (0.1,)),
        (40_000, (0.1,)), (2000, (0.05, 0.1)), (4000, (0.05, 0.25)),
        pytest.param(200_000, (0.05, 0.1), marks=pytest.mark.slow),
        pytest.param(1_000_000, MANY, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_averages_of_any_number_of_updates_are_accurate_to_a_millionth(
    steps: int, widths: tuple[float, ...]
) -> None:
    period, size = 97, 64
    start, drift, jitter = paths(steps, period, size)
    model = nn.Linear(size, len(start), bias=False)
    ema = PowerEMA(model, widths)
    first, moves, noises = (torch.from_numpy(x).float() for x in (start, drift, jitter))
    for t in range(1, steps + 1):
        torch.add(first, moves, alpha=t / steps, out=model.weight.data).add_(noises[t % period])
        ema.update(t)
    for sigma_rel in widths:
        edges = (np.arange(steps + 1) / steps) ** (sigma_rel_to_gamma(sigma_rel) + 1)
        masses = np.diff(edges)
        now = np.arange(1, steps + 1)
        by_phase = np.bincount(now % period, weights=masses, minlength=period)
        truth = start + drift * (masses @ now / steps) + np.tensordot(by_phase, jitter, 1)
        error = np.linalg.norm(ema.average(sigma_rel)["weight"].double().numpy() - truth, axis=1)
        error /= np.linalg.norm(truth, axis=1)
        assert error.max() < 1e-6, (sigma_rel, error)
        distance = np.linalg.norm(model.weight.detach().double().numpy() - truth, axis=1)
        mean_of = ema._averages.mean_of(steps)
        rounding = [arithmetic_rounding(steps, x, mean_of) for x in distance / np.linalg.norm(truth, axis=1)]
        assert np.all(error[1:] < 3 * np.array(rounding)[1:])


@pytest.mark.parametrize("widths", [MANY, (0.05, 0.1), (0.02,)])
def test_averages_of_a_random_walk_are_accurate_to_a_millionth(widths: tuple[float, ...]) -> None:
    steps = 4000
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(200, 1, bias=False)
    ema, exact = PowerEMA(model, widths), PowerEMA(model, widths, dtype=torch.float64)
    path = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    for t in range(1, steps + 1):
        path += 0.05 * steps**-0.5 * torch.randn(path.shape, generator=generator, dtype=torch.float64)
        model.weight.data.copy_(path)
        ema.update(t)
        exact.update(t)
    for sigma_rel in widths:
        truth = exact.average(sigma_rel)["weight"]
        assert (ema.average(sigma_rel)["weight"] - truth).norm() < 1e-6 * truth.norm()


def late(model: nn.Module, times: list[int], seed: int = 0) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for t in times:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
        yield t


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7)).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("times", [LATE, LATER])
def test_a_window_holds_the_mean_of_its_updates(dtype: torch.dtype, left: int, times: list[int]) -> None:
    model = network(dtype)
    ema, exact = PowerEMA(model, WIDTHS), PowerEMA(model, WIDTHS, dtype=torch.float64)
    for t in late(model, times[: len(times) - left]):
        ema.update(t)
        exact.update(t)
    windows = [key for key in ema.state_dict() if key.startswith("window.")]
    assert len(windows) == (4 if left else 0)
    assert not any(key.startswith("window.") for key in exact.state_dict())
    for sigma_rel in WIDTHS:
        for name, truth in exact.average(sigma_rel).items():
            assert (ema.average(sigma_rel)[name] - truth).norm() < 3e-6 * truth.norm()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    model, twin = network(), network()
    ema, unread = PowerEMA(model, WIDTHS, run_id="a"), PowerEMA(twin, WIDTHS, run_id="a")
    for t in late(model, LATE):
        ema.update(t)
        ema.average(0.1)
        ema.average(0.07)
        with ema.applied(model, 0.25):
            pass
        ema.snapshot(tmp_path)
        ema.load_state_dict(
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in ema.state_dict().items()}
        )
    for t in late(twin, LATE):
        unread.update(t)
    assert_equal_states(ema, unread)


def assert_equal_states(ema: PowerEMA, other: PowerEMA) -> None:
    mine, theirs = ema.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], (
            key
        )


@pytest.mark.parametrize("stop", range(17, 26))
def test_a_run_resumed_within_a_window_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    model, twin = network(), network()
    ema, other = PowerEMA(model, run_id="a"), PowerEMA(twin, run_id="b")
    for t in late(model, LATE[:stop]):
        ema.update(t)
    other.load_state_dict(ema.state_dict())
    twin.load_state_dict(model.state_dict())
    for a, b in zip(late(model, LATE[stop:], seed=1), late(twin, LATE[stop:], seed=1), strict=True):
        ema.update(a)
        other.update(b)
    assert_equal_states(ema, other)
    ema.snapshot(tmp_path)
    stored = reconstruct(tmp_path, 0.1).tensors
    for name, tensor in other.average(0.1).items():
        assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.1)])
@pytest.mark.parametrize("first", [0, 1000, 20_000])
def test_a_run_is_resumed_after_any_update(sigma_rels: tuple[float, ...], first: int) -> None:
    """Whatever windows are open, and wherever the base was renewed."""
    model = network()
    ema = PowerEMA(model, sigma_rels, run_id="a")
    if first:
        ema.update(first)
    for step, t in enumerate(late(model, [first + k for k in range(1, 60)])):
        ema.update(t)
        twin = network()
        other = PowerEMA(twin, sigma_rels, run_id="b")
        other.load_state_dict(ema.state_dict())
        assert_equal_states(ema, other)
        if step % 7 == 0:  # it goes on as the first does
            twin.load_state_dict(model.state_dict())
            follower, leader = copy.deepcopy((other, twin)), copy.deepcopy((ema, model))
            for tracker, net in (follower, leader):
                for later in late(net, [t + k for k in range(1, 20)], seed=1):
                    tracker.update(later)
            assert_equal_states(follower[0], leader[0])


@pytest.mark.parametrize("stop", [1, 2, 3, len(LATE)])
def test_a_state_of_the_first_format_is_loaded(stop: int) -> None:
    """It held the averages themselves, and a window as the difference to the first of them."""
    model = network()
    ema, other = PowerEMA(model, run_id="a"), PowerEMA(model, run_id="b")
    for t in late(model, LATE[:stop]):
        ema.update(t)
    now = ema.state_dict()
    state = {k: now[k] for k in ("clock", "sigma_rels", "run_id", "start", "t")}
    state |= {"format": "edm2.ema.PowerEMA/1", "updates": stop}
    for i in (0, 1):
        state |= {f"average.{i}.{n}": now[f"base.{n}"] - now[f"offset.{i}.{n}"] for n in ema.names}
    if now["folded"] < now["t"]:
        state |= {"folded": now["folded"], "folds": 3}
        assert now["held"]  # the window is a plain mean
        state |= {f"window.{n}": now[f"window.{n}"] - state[f"average.0.{n}"] for n in ema.names}
    other.load_state_dict(state)
    assert (other.run_id, other.t) == ("a", LATE[stop - 1])
    for sigma_rel in (0.05, 0.1):
        for name, average in ema.average(sigma_rel).items():
            torch.testing.assert_close(other.average(sigma_rel)[name], average, rtol=0, atol=3e-7)


def test_averages_in_float64_that_take_over_a_window_close_it_at_once() -> None:
    model = network()
    ema, exact = PowerEMA(model), PowerEMA(model, dtype=torch.float64)
    times = late(model, LATE)
    for t in LATE[:3]:
        assert next(times) == t
        ema.update(t)
    exact.load_state_dict(ema.state_dict())
    before = exact.average(0.1)["1.bias"].clone()
    exact.update(next(times))
    assert not any(key.startswith("window.") for key in exact.state_dict())
    share = -np.expm1((sigma_rel_to_gamma(0.1) + 1) * np.log1p(-10 / LATE[3]))
    moved = exact.average(0.1)["1.bias"] - before
    torch.testing.assert_close(moved, share * (model[1].bias.double() - before), rtol=2e-3, atol=1e-9)


def test_a_state_whose_window_is_lost_is_refused() -> None:
    model = network()
    ema = PowerEMA(model)
    for t in late(model, LATE[:3]):
        ema.update(t)
    state = ema.state_dict()
    with pytest.raises(ValueError, match="not one that state_dict returned"):
        PowerEMA(model).load_state_dict({k: v for k, v in state.items() if not k.startswith("window.")})
    with pytest.raises(ValueError, match=r"1 tensors are missing, .*'window.1.bias'"):
        PowerEMA(model).load_state_dict({k: v for k, v in state.items() if k != "window.1.bias"})
    with pytest.raises(ValueError, match=r"returned: folded is missing or wrong"):
        PowerEMA(model).load_state_dict({**state, "folded": "3"})


@pytest.mark.parametrize("widths", [(0.1,), (0.05, 0.1, 0.2)])
def test_windows_that_averages_do_not_have_are_refused(widths: tuple[float, ...]) -> None:
    model = network()
    pair, other = PowerEMA(model), PowerEMA(model, widths)
    for t in late(model, [*range(1, 8)]):
        pair.update(t)
        other.update(t)
    own = {key: x for key, x in pair.state_dict().items() if key.startswith("own_window.")}
    assert len(own) == 8
    common = {key: x for key, x in pair.state_dict().items() if key not in own}
    common |= {f"window.{name}": own[f"own_window.0.{name}"] for name in pair.names}
    before = [tracker.average(0.1)["1.bias"] for tracker in (pair, other)]
    with pytest.raises(
        ValueError, match=r"the state is of another model: .* tensors are missing, new or of another"
    ):
        other.load_state_dict({**other.state_dict(), **own})
    for state in (pair.state_dict(), common):
        with pytest.raises(ValueError, match="not one that state_dict returned: held is missing or wrong"):
            pair.load_state_dict({**state, "held": -1})
    for tracker, average in zip((pair, other), before, strict=True):  # nothing was lost
        assert torch.equal(tracker.average(0.1)["1.bias"], average)


def test_host_averages_equal_averages_beside_the_weights() -> None:
    tensors = [
        torch.randn(5, generator=torch.Generator().manual_seed(0)),
        torch.ones(3, dtype=torch.bfloat16),
    ]
    rules = [partial(step_weight, gamma=gamma) for gamma in (1.0, 9.0)]
    beside, host = (
        kind(tensors, ["a", "b"], rules, start=0, dtype=torch.float32, windows=windows_per_run((1.0, 9.0)))
        for kind in (Averages, HostAverages)
    )
    for t in LATE:
        tensors[0].mul_(0.9)
        beside.update(tensors, t)
        host.update(tensors, t)
        tensors[1].add_(1)
        assert all(
            torch.equal(a, b) for i in (0, 1) for a, b in zip(beside.read(i), host.read(i), strict=True)
        )


def test_large_tensors_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = network(), network()
    for module in (model, twin):
        module[1].weight.data = module[1].weight.detach().t().contiguous().t()
    ema = PowerEMA(model, run_id="a")
    for t in late(model, LATE):
        ema.update(t)
    monkeypatch.setattr("edm2.ema.tracking.buffers._CACHED_ELEMENTS", 8)
    pieces = PowerEMA(twin, run_id="a")
    for t in late(twin, LATE):
        pieces.update(t)
    for sigma_rel in (0.05, 0.1):
        for name, tensor in ema.average(sigma_rel).items():
            torch.testing.assert_close(pieces.average(sigma_rel)[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("widths", "windows"),
    [
        ((0.1,), {10: ["window"], 2000: ["window"]}),
        ((0.05, 0.1), {10: ["own_window"] * 2, 3050: ["own_window"] * 2, 3151: ["window"]}),
        ((0.05, 0.1, 0.2), {10: [], 1023: [], 2001: ["window"]}),
    ],
)
def test_weights_at_rest_are_their_own_average_whatever_windows_are_open(
    widths: tuple[float, ...], windows: dict[int, list[str]]
) -> None:
    model = network()
    ema = PowerEMA(model, widths)
    for t in range(1, max(windows) + 1):
        ema.update(t)
        if t in windows:
            open_now = [key.partition(".")[0] for key in ema.state_dict() if key.endswith(".1.bias")]
            assert [kind for kind in open_now if kind.endswith("window")] == windows[t]
            for sigma_rel in ema.sigma_rels:
                for name, tensor in model.named_parameters():
                    assert torch.equal(ema.average(sigma_rel)[name], tensor)


def test_a_state_of_the_second_format_is_loaded() -> None:
    """Its windows were offsets always, and it did not say so."""
    model = network()
    ema, other = PowerEMA(model, run_id="a"), PowerEMA(model, run_id="b")
    for t in late(model, LATER[:3]):
        ema.update(t)
    state = {k: v for k, v in ema.state_dict().items() if k != "held"}
    assert any(k.startswith("window.") for k in state)
    other.load_state_dict({**state, "format": "edm2.ema.PowerEMA/2"})
    assert_equal_states(ema, other)


def test_a_state_of_the_third_format_is_loaded() -> None:
    """Its averages had one window always; it is filled before each has its own."""
    model, twin = network(), network()
    ema, exact = PowerEMA(model, run_id="a"), PowerEMA(model, dtype=torch.float64)
    times = late(model, [19_990, *range(20_000, 21_000, 10)])
    for t in itertools.islice(times, 5):
        ema.update(t)
        exact.update(t)
    state = ema.state_dict()
    assert sum(key.startswith("own_window.0.") for key in state) == 4
    old = {key: x for key, x in state.items() if not key.startswith("own_window.")}
    old |= {f"window.{name}": state[f"own_window.0.{name}"] for name in ema.names}
    twin.load_state_dict(model.state_dict())
    other = PowerEMA(twin)
    other.load_state_dict({**old, "format": "edm2.ema.PowerEMA/3"})
    for t in times:
        twin.load_state_dict(model.state_dict())
        exact.update(t)
        other.update(t)
    assert any(key.startswith("own_window.") for key in other.state_dict())
    for name, truth in exact.average(0.1).items():
        assert (other.average(0.1)[name] - truth).norm() < 3e-6 * truth.norm()


def test_update_in_a_window_allocates_nothing_once_it_runs() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 64).bfloat16())
    ema = PowerEMA(model)
    for t in LATE[:7]:
        ema.update(t)
    with torch.profiler.profile(profile_memory=True) as profile:
        for t in LATE[7:14]:
            ema.update(t)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1024
