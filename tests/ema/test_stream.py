"""The streamed sum does not depend on how the files are cut into pieces and groups."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct_many, stream


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
        monkeypatch.setattr(stream, name, value)
    for one, other in zip(whole, reconstruct_many(tmp_path, [0.07, 0.15], warn_above=1), strict=True):
        torch.testing.assert_close(one.tensors, other.tensors, rtol=1e-5, atol=1e-6)
