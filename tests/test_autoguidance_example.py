import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "autoguidance_2d.py"
    spec = importlib.util.spec_from_file_location("autoguidance_2d", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_density_integrates_to_one_and_samples_follow_it(example):
    tree = example.Tree()
    side = torch.linspace(-3, 3, 601)
    grid = torch.cartesian_prod(side, side)
    density = tree.log_density(grid, 0).exp()
    assert float(density.sum()) * 0.01**2 == pytest.approx(1.0, abs=1e-3)
    points, labels = tree.sample(torch.arange(40_000), seed=0, label=0)
    assert labels.unique().tolist() == [0]
    expected = (density[:, None] * grid).sum(dim=0) / density.sum()
    assert torch.allclose(points.mean(dim=0), expected, atol=0.01)
    both, _ = tree.sample(torch.arange(40_000), seed=0)
    assert float(both.square().mean().sqrt()) == pytest.approx(example.SIGMA_DATA, rel=0.02)


def test_true_points_are_judged_as_such(example):
    tree = example.Tree()
    points, _ = tree.sample(torch.arange(8000), seed=3, label=1)
    outliers, reached = example.judge(tree, points, label=1, floor=-1e9)
    assert outliers == 0
    assert reached > 0.97
    outliers, reached = example.judge(tree, points + 10, label=1, floor=-10.0)
    assert (outliers, reached) == (1.0, 0.0)


@pytest.mark.slow
def test_shows_what_guidance_does_even_after_a_short_training(example, tmp_path):
    judged = example.run(tmp_path / "a" / "picture.png", steps=150, num_points=500, save=tmp_path / "nets")
    _, (plain, reached), (_, kept), (auto, auto_reached) = judged.values()
    assert auto < 0.8 * plain  # a weaker model removes outliers
    assert auto_reached > 0.9 * reached  # and loses no branches,
    assert kept < 0.9 * reached  # as an unconditional one does
    assert np.asarray(PIL.Image.open(tmp_path / "a" / "picture.png").convert("RGB")).std() > 5
    saved = example.ToyDenoiser(32)
    saved.load_state_dict(load_file(tmp_path / "nets" / "weak.safetensors"))
