"""Long runs, in which one update is less than float32's rounding: averages go on moving, by way of windows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct, sigma_rel_to_gamma
from edm2.ema.storage.encoding import arithmetic_rounding
from edm2.ema.tracking.averages import Averages
from edm2.ema.tracking.offload import HostAverages
from edm2.ema.tracking.window import LONG_RUN, next_step

WIDTHS = (0.03, 0.05, 0.1, 0.25)
# Far into training, so that a window opens at the second update and holds five.
LATE = [90_000, *range(90_010, 90_260, 10)]


def test_averages_of_a_hundred_thousand_updates_are_exact() -> None:
    steps, period, size = 100_000, 97, 64
    rng = np.random.default_rng(0)
    base, direction = rng.standard_normal((2, size))
    noise = rng.standard_normal((period, size))
    # Rows: a mean of 1 with a little noise; a slow drift with less noise; a drift and none.
    start = np.stack([np.ones(size), base, base])
    drift = np.stack([np.zeros(size), 1e-3 * direction, 1e-2 * direction])
    jitter = np.stack([1e-3 * noise, 1e-4 * noise, 0 * noise], axis=1)
    model = nn.Linear(size, 3, bias=False)
    ema = PowerEMA(model, WIDTHS)
    first, moves, noises = (torch.from_numpy(x).float() for x in (start, drift, jitter))
    for t in range(1, steps + 1):
        torch.add(first, moves, alpha=t / steps, out=model.weight.data).add_(noises[t % period])
        ema.update(t)
    for sigma_rel in WIDTHS:
        edges = (np.arange(steps + 1) / steps) ** (sigma_rel_to_gamma(sigma_rel) + 1)
        masses = np.diff(edges)
        now = np.arange(1, steps + 1)
        by_phase = np.bincount(now % period, weights=masses, minlength=period)
        truth = start + drift * (masses @ now / steps) + np.tensordot(by_phase, jitter, 1)
        error = np.linalg.norm(ema.average(sigma_rel)["weight"].double().numpy() - truth, axis=1)
        error /= np.linalg.norm(truth, axis=1)
        assert error.max() < 1.5e-6, (sigma_rel, error)
        assert error.max() < 1.5 * arithmetic_rounding(steps, sigma_rel)


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
@pytest.mark.parametrize("stop", [len(LATE), len(LATE) - 2])
def test_a_window_holds_the_mean_of_its_updates(dtype: torch.dtype, stop: int) -> None:
    model = network(dtype)
    ema, exact = PowerEMA(model, WIDTHS), PowerEMA(model, WIDTHS, dtype=torch.float64)
    for t in late(model, LATE[:stop]):
        ema.update(t)
        exact.update(t)
    windows = [key for key in ema.state_dict() if key.startswith("window.")]
    assert len(windows) == (0 if stop == len(LATE) else 4)
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


def test_a_state_of_before_there_were_windows_is_loaded() -> None:
    model = network()
    ema, other = PowerEMA(model, run_id="a"), PowerEMA(model, run_id="a")
    for t in late(model, LATE[:1]):
        ema.update(t)
    state = ema.state_dict()
    other.load_state_dict({k: v for k, v in state.items() if k not in ("folded", "folds")})
    assert_equal_states(ema, other)


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
    with pytest.raises(ValueError, match="not one that state_dict gave"):
        PowerEMA(model).load_state_dict({k: v for k, v in state.items() if not k.startswith("window.")})
    with pytest.raises(ValueError, match=r"1 tensors are missing, .*'window.1.bias'"):
        PowerEMA(model).load_state_dict({k: v for k, v in state.items() if k != "window.1.bias"})
    with pytest.raises(ValueError, match=r"gave: folds is missing or wrong"):
        PowerEMA(model).load_state_dict({**state, "folds": "3"})


def test_host_averages_equal_averages_beside_the_weights() -> None:
    tensors = [
        torch.randn(5, generator=torch.Generator().manual_seed(0)),
        torch.ones(3, dtype=torch.bfloat16),
    ]
    beside = Averages(tensors, 2, dtype=torch.float32)
    host = HostAverages(tensors, 2, dtype=torch.float32)
    folded = 0
    for before, t in zip([0, *LATE], LATE, strict=False):
        tensors[0].mul_(0.9)
        step = next_step([1.0, 9.0], elapsed=t, dt=t - before, span=t - folded, folds=t, exact=False)
        folded = t if step.weights is not None else folded
        beside.update(tensors, step)
        host.update(tensors, step)
        tensors[1].add_(1)
    for track in (0, 1):
        for share in (0.0, 0.3):
            pairs = zip(beside.read(track, share), host.read(track, share), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_large_tensors_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = network(), network()
    for module in (model, twin):
        module[1].weight.data = module[1].weight.detach().t().contiguous().t()
    ema = PowerEMA(model, run_id="a")
    for t in late(model, LATE):
        ema.update(t)
    monkeypatch.setattr("edm2.ema.tracking.averages._CACHED_ELEMENTS", 8)
    pieces = PowerEMA(twin, run_id="a")
    for t in late(twin, LATE):
        pieces.update(t)
    for sigma_rel in (0.05, 0.1):
        for name, tensor in ema.average(sigma_rel).items():
            torch.testing.assert_close(pieces.average(sigma_rel)[name], tensor, rtol=1e-6, atol=1e-7)


def test_weights_at_rest_are_their_own_average_and_short_runs_have_no_window() -> None:
    model = network()
    ema = PowerEMA(model, WIDTHS)
    for t in range(1, LONG_RUN):
        ema.update(t)
    assert ema._averages.window is None
    for t in range(LONG_RUN, 2 * LONG_RUN):
        ema.update(t)
    assert ema._averages.window is not None
    for sigma_rel in WIDTHS:
        for name, tensor in model.named_parameters():
            assert torch.equal(ema.average(sigma_rel)[name], tensor)


def test_windows_are_short_beside_every_average_and_evenly_dithered() -> None:
    for sigma_rel in (0.005, 0.03, 0.25):
        gamma = sigma_rel_to_gamma(sigma_rel)
        at, folded, folds, dithers = 50_000, 50_000, 0, []
        while folds < 2000:
            at += 1
            step = next_step([gamma], elapsed=at, dt=1, span=at - folded, folds=folds, exact=False)
            if step.weights is None:
                continue
            assert (at - folded - 1) / at * max(1024, 64 * (gamma + 1)) < 1
            folded, folds = at, folds + 1
            dithers.append(step.dither)
        if sigma_rel > 0.02:
            assert abs(np.cumsum(dithers)).max() < 5 * 2.0**-23
            assert np.std(dithers) == pytest.approx(0.6 * 2.0**-23, rel=0.02)


def test_update_in_a_window_allocates_nothing_once_it_runs() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 64).bfloat16())
    ema = PowerEMA(model)
    for t in LATE[:7]:
        ema.update(t)
    with torch.profiler.profile(profile_memory=True) as profile:
        for t in LATE[7:14]:
            ema.update(t)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1024
