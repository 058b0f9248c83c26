"""The streamed sum does not depend on how the files are cut into pieces and groups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct_many
from edm2.ema.storage import weighted_sums
from edm2.ema.storage.tensorfile import read_header, save_tensors


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(weighted_sums, "_PIECE", 8)
    generator = torch.Generator().manual_seed(0)
    coefficients = np.random.default_rng(0).standard_normal((19, 3))
    whole = [
        {n: torch.randn(size, generator=generator).to(dtype) for n, size in (("a", 21), ("b", 8))}
        for _ in range(19)
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
