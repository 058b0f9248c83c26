"""The tracker against sums done by hand in float64."""

import subprocess
import sys
from collections.abc import Iterator

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
def test_average_is_exact_at_any_interval(times: list[float]) -> None:
    model = nn.Linear(7, 5)
    ema = PowerEMA(model, (0.05, 0.1, 0.25))
    history = []
    for t in walk(model, times):
        ema.update(t)
        history.append(model.weight.detach().double().clone())
    for sigma_rel in (0.05, 0.1, 0.25):
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
    for t in (5, 4, float("nan")):
        with pytest.raises(ValueError, match="t must increase"):
            ema.update(t)


def test_a_changed_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ema = PowerEMA(model)
    ema.update(1)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"'0.weight' changed its shape from \(2, 2\) to \(3, 2\)"):
        ema.update(2)
    del model[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' is no longer in the model"):
        ema.update(2)


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="one or more different widths"):
        PowerEMA(nn.Linear(2, 2), (0.1, 0.1))


def test_import_loads_nothing_else_of_edm2() -> None:
    code = (
        "import sys, edm2.ema; "
        "print(sorted(m for m in sys.modules if m.startswith('edm2') and not m.startswith('edm2.ema')), "
        "[m for m in ('matplotlib', 'sklearn', 'scipy', 'PIL', 'tyro', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['edm2'] []"
