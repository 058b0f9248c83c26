"""Folders that the real ema-pytorch, nitrous-ema and pytorch-posthoc-ema write in a real training."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edm2.ema import reconstruct_many, sigma_rel_to_gamma
from edm2.interop import open_ema_folder

TARGETS = (0.08, 0.15)
STEPS, UPDATE_EVERY = 1000, 10


class EmaPytorch:
    """One of the libraries, called as its README says."""

    module = "ema_pytorch"

    def __init__(self, model: nn.Module, folder: Path) -> None:
        library = importlib.import_module(self.module)
        self.ema = library.PostHocEMA(
            model,
            sigma_rels=(0.05, 0.28),
            update_every=UPDATE_EVERY,
            checkpoint_every_num_steps=100,
            checkpoint_folder=str(folder),
        )

    def update(self, model: nn.Module) -> None:
        self.ema.update()

    def own(self, model: nn.Module, sigma_rel: float) -> dict[str, torch.Tensor]:
        return self.ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.state_dict()  # type: ignore[no-any-return]


class NitrousEma(EmaPytorch):
    module = "nitrous_ema"

    def own(self, model: nn.Module, sigma_rel: float) -> dict[str, torch.Tensor]:
        made = self.ema.synthesize_ema_model(sigma_rel=sigma_rel, device="cpu")
        return made.ema_model.state_dict()  # type: ignore[no-any-return]


class PosthocEma(EmaPytorch):
    module = "posthoc_ema"

    def __init__(self, model: nn.Module, folder: Path) -> None:
        library = importlib.import_module(self.module)
        self.ema = library.PostHocEMA.from_model(
            model,
            str(folder),
            sigma_rels=(0.05, 0.28),
            update_every=UPDATE_EVERY,
            checkpoint_every=100,
            max_checkpoints=100,
        )

    def update(self, model: nn.Module) -> None:
        self.ema.update_(model)

    def own(self, model: nn.Module, sigma_rel: float) -> dict[str, torch.Tensor]:
        with self.ema.state_dict(sigma_rel=sigma_rel) as state:
            return {name: x.clone() for name, x in state.items()}


def train(library: Any) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Fit a small network to noisy targets at a constant rate; returns exact averages in float64."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
    ema = library(model)
    teacher = torch.randn(16, 4, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = [{n: p.detach().double().clone() for n, p in model.named_parameters()} for _ in TARGETS]
    for step in range(1, STEPS + 1):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x @ teacher - torch.randn(32, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        for sums, sigma_rel in zip(exact, TARGETS, strict=True):
            share = 1 - (1 - 1 / step) ** (sigma_rel_to_gamma(sigma_rel) + 1)
            for name, p in model.named_parameters():
                sums[name].lerp_(p.detach().double(), share)
    model.ema = [ema]  # type: ignore[assignment]
    return model, exact


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    squares = sum(float((found[n].double() - x).square().sum()) for n, x in exact.items())
    return float((squares / sum(float(x.square().sum()) for x in exact.values())) ** 0.5)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("library", [EmaPytorch, NitrousEma, PosthocEma])
def test_better_averages_than_the_librarys_own(tmp_path: Path, library: type[EmaPytorch]) -> None:
    pytest.importorskip(library.module)
    model, exact = train(lambda model: library(model, tmp_path / "averages"))
    folder = open_ema_folder(tmp_path / "averages", sigma_rels=(0.05, 0.28), update_every=UPDATE_EVERY)
    results = reconstruct_many(folder, TARGETS, warn_above=1.0)
    for sigma_rel, result, truth in zip(TARGETS, results, exact, strict=True):
        own = distance(model.ema[0].own(model, sigma_rel), truth)  # type: ignore[index, union-attr]
        ours = distance(result.tensors, truth)
        assert ours < result.expected_error
        assert ours < 0.2 * own
    fresh = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
    fresh.load_state_dict(results[0].tensors)
