"""The live average equals those of the libraries that docs/coming_from.md names, where they are installed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edm2.ema import LiveEMA, PowerEMA
from edm2.ema.storage.manifest import read_manifest

PAGE = Path(__file__).parents[3] / "docs" / "coming_from.md"


def walk(model: nn.Module, steps: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        yield step


def check(
    live: LiveEMA, model: nn.Module, update: Callable[[int], Any], theirs: Callable[[], torch.Tensor]
) -> None:
    ema = PowerEMA(model, live=live)
    for step in walk(model, 60):
        ema.update(step)
        update(step)
    torch.testing.assert_close(ema.average("live")["weight"], theirs(), rtol=1e-5, atol=1e-6)
    assert (theirs() - model.weight).norm() > 0.1 * model.weight.norm()


def test_swa_utils() -> None:
    model = nn.Linear(5, 5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    check(
        LiveEMA(beta=0.95, inv_gamma=None), model, lambda _: averaged.update_parameters(model),
        lambda: averaged.module.weight.detach(),
    )  # fmt: skip


def test_diffusers() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = nn.Linear(5, 5)
    averaged = training_utils.EMAModel(
        model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=2.0, power=0.75, update_after_step=10,
        min_decay=0.3,
    )  # fmt: skip
    live = LiveEMA(beta=0.9, inv_gamma=2.0, power=0.75, update_after_step=10, min_value=0.3)
    check(live, model, lambda _: averaged.step(model.parameters()), lambda: averaged.shadow_params[0])


def test_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.Linear(5, 5)
    averaged = ema_pytorch.EMA(
        model, beta=0.9, update_after_step=10, update_every=1, inv_gamma=2.0, power=0.75
    )
    live = LiveEMA(beta=0.9, update_after_step=10, inv_gamma=2.0, power=0.75)
    check(live, model, lambda _: averaged.update(), lambda: averaged.ema_model.weight.detach())


def test_timm() -> None:
    utils = pytest.importorskip("timm.utils")
    model = nn.Linear(5, 5)
    averaged = utils.ModelEmaV3(model, decay=0.9, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75)
    live = LiveEMA(beta=0.9, inv_gamma=2.0, power=0.75)
    check(
        live, model, lambda step: averaged.update(model, step=step), lambda: averaged.module.weight.detach()
    )


def test_the_pages_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(1234):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    model = nn.Linear(4, 4)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.01), "train": train}
    (code,) = PAGE.read_text().split("```python\n")[1:]
    exec(code.split("```")[0], {**names, "inputs": torch.ones(1, 4)})
    assert sorted({s.t for s in read_manifest("snapshots").snapshots}) == [500, 1000, 1234]
