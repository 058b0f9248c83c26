"""Streamed sums do not depend on how files are cut into pieces; distances between files come from a sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct_many
from edm2.ema.storage import weighted_sums
from edm2.ema.storage.tensorfile import read_header, save_tensors
from edm2.ema.storage.weighted_sums import sample_squares


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_pieces_and_groups_of_files_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 3)
    ema = PowerEMA(model)
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn(3, 7))
        ema.update(step)
        ema.snapshot(tmp_path, dtype=dtype)
    whole = reconstruct_many(tmp_path, [0.07, 0.15], warn_above=1)
    for name, value in (("_PIECE", 4), ("_FILES", 3), ("_MAX_OPEN", 5)):
        monkeypatch.setattr(weighted_sums, name, value)
    for one, other in zip(whole, reconstruct_many(tmp_path, [0.07, 0.15], warn_above=1), strict=True):
        torch.testing.assert_close(one.tensors, other.tensors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.float16)])
def test_sums_are_those_of_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr(weighted_sums, "_PIECE", 8)
    generator = torch.Generator().manual_seed(0)
    coefficients = np.random.default_rng(0).standard_normal((19, 3))
    whole = [
        {
            n: torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)])
            for n, size in (("a", 21), ("b", 8))
        }
        for i in range(19)
    ]
    scales = [{"a": 2.0**i} for i in range(19)]
    files = [read_header(save_tensors(tmp_path / f"{i}", tensors, {})) for i, tensors in enumerate(whole)]
    sums = weighted_sums.WeightedSums(files, coefficients, scales=scales).run(["a", "b"])
    for j, found in enumerate(sums):
        for name in ("a", "b"):
            scaled = [x[name].double() * scale.get(name, 1.0) for x, scale in zip(whole, scales, strict=True)]
            truth = sum(c * x for c, x in zip(coefficients[:, j], scaled, strict=True))
            assert (found[name] - truth).norm() < 1e-6 * torch.stack(scaled).norm()
    places = [("a", 3, 5), ("a", 20, 1), ("b", 0, 8)]
    elements = weighted_sums.read_elements(files[4], places, scales[4])
    expected = torch.cat([whole[4]["a"][[3, 4, 5, 6, 7, 20]].double() * 16, whole[4]["b"].double()])
    assert elements.tolist() == expected.tolist()


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
