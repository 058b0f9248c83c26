"""What both callbacks refuse."""

import pytest
from torch import nn

from edm2.ema.callbacks.steps import track_steps


def test_sharded_models_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.device_mesh = model.weight.placements = None
    with pytest.raises(ValueError, match="cannot write checkpoints of a sharded model"):
        track_steps(model, (0.1,))
