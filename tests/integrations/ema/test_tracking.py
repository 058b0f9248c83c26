"""What both callbacks refuse."""

from pathlib import Path

import pytest
from torch import nn

from edm2.ema.callbacks.steps import StepsCallback


def test_sharded_models_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight.device_mesh = model.weight.placements = None
    with pytest.raises(ValueError, match="cannot write checkpoints of a sharded model"):
        StepsCallback(tmp_path, (0.1,), 1, "fp32", {})._begin(model)
