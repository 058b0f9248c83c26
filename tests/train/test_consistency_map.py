"""Consistency tuning finds the map from noise to data that the probability-flow ODE defines."""

import math

import pytest
import torch
from torch import nn

from edm2.diffusion import (
    Denoiser,
    LearnedUncertainty,
    consistency_steps,
    sample_consistency,
    sample_heun,
    time_steps,
)
from edm2.ema import PowerEMA
from edm2.nn import keyed_bits, keyed_normal
from edm2.train import ConsistencyConfig, LossConfig, TrainConfig
from edm2.train.consistency import ConsistencyObjective, Teacher
from edm2.train.objectives import TrainingBatch

MEANS = torch.tensor([[-0.55, -0.3], [0.55, -0.3], [0.0, 0.6]])
STD = 0.2
_FIRST = 10.0


def exact_denoiser(x, sigma, labels=None, **_):
    """E[y | x] for a mixture of three Gaussians on the plane."""
    points, variance = x.flatten(1).double(), STD**2 + sigma.double().reshape(-1, 1) ** 2
    offsets = points[:, None, :] - MEANS.double()
    share = (-offsets.square().sum(dim=2) / (2 * variance)).softmax(dim=1)
    means = MEANS + (STD**2 / variance)[:, :, None] * offsets
    return (share[:, :, None] * means).sum(dim=1).reshape(x.shape).to(x.dtype)


def exact_map(x, sigma, labels=None):
    """The end of the path of the ODE through x at sigma, by 400 steps of Heun."""
    levels = time_steps(400, sigma_min=1e-4, sigma_max=float(sigma))
    return sample_heun(exact_denoiser, x / float(sigma), levels, dtype=torch.float64).to(x.dtype)


class Plane(nn.Module):
    """A multilayer perceptron over points `[B, 2, 1, 1]`."""

    img_resolution, img_channels, label_dim = 1, 2, 0

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
            nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))

    def forward(self, x, c_noise, labels):
        angles = c_noise.reshape(-1, 1).expand(len(x), 1) * self.frequencies
        given = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        return self.layers(given).reshape(x.shape)


def tuned_student(path: str, steps: int = 3000, batch: int = 512) -> Denoiser:
    torch.manual_seed(0)
    student = Denoiser(Plane(), uncertainty=LearnedUncertainty(16))
    options = ConsistencyConfig(path=path, halving_images=steps * batch // 4, huber=0.03, sigma_max=_FIRST)
    config = TrainConfig(consistency=options, loss=LossConfig(p_mean=-0.4, p_std=1.6))
    objective = ConsistencyObjective(config, Teacher(exact_denoiser, {}))
    optimizer, ema = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99)), PowerEMA(student, (0.05,))
    for step in range(steps):
        index = torch.arange(step * batch, (step + 1) * batch)
        which = keyed_bits(index, 1, stream=5)[:, 0] % 3
        points = MEANS[which] + STD * keyed_normal(index, (2,), stream=6)
        loss = objective(
            student, TrainingBatch(images=points.reshape(-1, 2, 1, 1), index=index, num_images=index[0])
        )
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        ema.update(step + 1)
    student.load_state_dict({**student.state_dict(), **ema.average(0.05)})
    return student.eval().requires_grad_(False)


def errors(student) -> dict[int, float]:
    """Mean distance of a student's points from the exact map's with the same noise, relative to the data's scale."""
    index = torch.arange(2000)
    noise = keyed_normal(index, (2, 1, 1), seed=9)
    scale = float((MEANS.square().sum(dim=1).mean() + 2 * STD**2).sqrt())
    found = {}
    for num_steps in (1, 2, 4):
        made = []
        for denoiser in (student, exact_map):
            draws = iter(range(1, 10))
            made.append(
                sample_consistency(
                    denoiser, noise, consistency_steps(num_steps, sigma_max=_FIRST),
                    randn_like=lambda x, draws=draws: keyed_normal(index, (2, 1, 1), seed=9, stream=next(draws)),
                )
            )  # fmt: skip
        found[num_steps] = float((made[0] - made[1]).flatten(1).norm(dim=1).mean()) / scale
    return found


@pytest.mark.slow
def test_the_student_finds_the_map_of_the_ode():
    found = errors(tuned_student("teacher"))
    assert found[1] < 0.025, found
    assert max(found[2], found[4]) < 0.02, found
