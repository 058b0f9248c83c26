"""Averages that other libraries wrote: their own synthesis against ours, both against exact averages in float64.

    pip install ema-pytorch nitrous-ema pytorch-posthoc-ema
    python benchmarks/ema_rescue.py                    # 4,000 steps, 20 times x 2 tracks, update_every 1, 10 and 100
    python benchmarks/ema_rescue.py --steps 1000

A small network with batch normalisation learns noisy targets at a constant rate. The libraries run with their own
settings but for `update_every`, `sigma_rels` and the times of their files.
"""

import importlib
import tempfile
import warnings
from pathlib import Path

import torch
from common import machine, options
from torch import nn

from edm2.ema import reconstruct_many, sigma_rel_to_gamma
from edm2.interop import open_ema_folder

GIVEN = (0.05, 0.28)
TARGETS = (0.06, 0.1, 0.15, 0.2)


class EmaPytorch:
    name, module = "ema-pytorch", "ema_pytorch"

    def __init__(self, model, folder, update_every, every):
        self.ema = importlib.import_module(self.module).PostHocEMA(
            model,
            sigma_rels=GIVEN,
            update_every=update_every,
            checkpoint_every_num_steps=every,
            checkpoint_folder=str(folder),
        )

    def update(self, model):
        self.ema.update()

    def own(self, sigma_rel):
        return self.ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.state_dict()


class NitrousEma(EmaPytorch):
    name, module = "nitrous-ema", "nitrous_ema"

    def own(self, sigma_rel):
        return self.ema.synthesize_ema_model(sigma_rel=sigma_rel, device="cpu").ema_model.state_dict()


class PosthocEma(EmaPytorch):
    name, module = "pytorch-posthoc-ema", "posthoc_ema"

    def __init__(self, model, folder, update_every, every):
        self.ema = importlib.import_module(self.module).PostHocEMA.from_model(
            model,
            str(folder),
            sigma_rels=GIVEN,
            update_every=update_every,
            checkpoint_every=every,
            max_checkpoints=1000,
        )

    def update(self, model):
        self.ema.update_(model)

    def own(self, sigma_rel):
        with self.ema.state_dict(sigma_rel=sigma_rel) as state:
            return {name: x.clone() for name, x in state.items()}


def train(library, folder, update_every, steps):
    """The library, and exact averages of the parameters."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4))
    teacher = torch.randn(16, 4, generator=generator)
    ema = library(model, folder, update_every, steps // 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parameters = dict(model.named_parameters())
    exact = [{n: p.detach().double().clone() for n, p in parameters.items()} for _ in TARGETS]
    for step in range(1, steps + 1):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x @ teacher - torch.randn(32, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        for sums, sigma_rel in zip(exact, TARGETS, strict=True):
            share = 1 - (1 - 1 / step) ** (sigma_rel_to_gamma(sigma_rel) + 1)
            for name, p in parameters.items():
                sums[name].lerp_(p.detach().double(), share)
    return ema, exact


def distance(found, exact):
    squares = sum(float((found[n].double() - x).square().sum()) for n, x in exact.items())
    return (squares / sum(float(x.square().sum()) for x in exact.values())) ** 0.5


def main():
    arguments = options(__doc__, steps=4000)
    warnings.simplefilter("ignore")
    print(f"{arguments.steps} steps, 20 times x 2 tracks ({GIVEN[0]:g}, {GIVEN[1]:g})")
    print(machine(torch.device("cpu")))
    print(f"{'library':<20} {'every':>5}  {'target':>6}  {'its own':>8}  {'edm2':>8}  expected")
    for library in (EmaPytorch, NitrousEma, PosthocEma):
        for update_every in (1, 10, 100):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "averages"
                ema, exact = train(library, path, update_every, arguments.steps)
                opened = open_ema_folder(path, sigma_rels=GIVEN, update_every=update_every)
                for target, truth, result in zip(
                    TARGETS, exact, reconstruct_many(opened, TARGETS), strict=True
                ):
                    print(
                        f"{library.name:<20} {update_every:>5}  {target:>6g}  {distance(ema.own(target), truth):>8.1e}"
                        f"  {distance(result.tensors, truth):>8.1e}  {result.expected_error:>8.1e}"
                    )


if __name__ == "__main__":
    main()
