"""Distances between stored averages, judged from a sample of their elements."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edm2.ema.storage.tensorfile import read_header, save_tensors
from edm2.ema.storage.weighted_sums import sample_squares


def test_each_element_counts_once_however_few_are_read(tmp_path: Path) -> None:
    # A large tensor of which a small part is read, and small ones that are read whole, all of different size.
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (600, 500), "row": (70,), "empty": (0, 3), "small": (3, 5)}
    scales = {"large": 1.0, "row": 50.0, "empty": 1.0, "small": 200.0}
    stored = [
        {name: scales[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in "abc"
    ]
    files = [read_header(save_tensors(tmp_path / f"{i}.safetensors", x, {})) for i, x in enumerate(stored)]
    exact = [
        [sum(float((a[n] - b[n]).double().square().sum()) for n in shapes) for b in stored] for a in stored
    ]
    found = sample_squares(files, [*shapes], [{}, {}, {}])
    np.testing.assert_allclose(found, exact, rtol=0.02, atol=1e-3)


def test_scales_are_taken_into_account(tmp_path: Path) -> None:
    for i, value in enumerate((1.0, 3.0)):
        save_tensors(tmp_path / f"{i}.safetensors", {"a": torch.full((4,), value)}, {})
    files = [read_header(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert sample_squares(files, ["a"], [{"a": 5.0}, {}])[0, 1] == 16.0


def test_a_file_with_values_that_are_not_finite_is_named(tmp_path: Path) -> None:
    for i, value in enumerate((1.0, torch.inf)):
        save_tensors(tmp_path / f"{i}.safetensors", {"a": torch.full((4,), value)}, {})
    files = [read_header(tmp_path / f"{i}.safetensors") for i in range(2)]
    with pytest.raises(ValueError, match=r"1\.safetensors is damaged: it holds values that are not finite"):
        sample_squares(files, ["a"], [{}, {}])
