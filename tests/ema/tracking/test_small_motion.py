"""Weights that move less between snapshots than the stored type rounds, as in fine-tuning."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import PLANS, PowerEMA, reconstruct_many


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("plan", ["paper", "compact"])
@pytest.mark.parametrize("motion", [1e-3, 1e-4])
def test_widths_come_back_with_an_honest_estimate(
    tmp_path: Path, plan: str, dtype: str, motion: float
) -> None:
    steps, widths = 300, sorted({*PLANS[plan].sigma_rels, 0.07, 0.15, 0.2})
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    ema, exact = PowerEMA(model, plan=plan), PowerEMA(model, widths, dtype=torch.float64)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(40, 40, generator=generator), alpha=motion * steps**-0.5)
        ema.update(step)
        exact.update(step)
        if step % 30 == 0:
            ema.snapshot(tmp_path, dtype=dtype)
    for sigma_rel, result in zip(widths, reconstruct_many(tmp_path, widths), strict=True):
        truth = exact.average(sigma_rel)["weight"]
        error = float((result.tensors["weight"] - truth).norm() / truth.norm())
        assert error <= result.expected_error < 5 * error
