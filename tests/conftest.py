"""Fixtures shared by all tests: golden numbers, fillings of networks, and settings of a tiny run."""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def draw_by_rule(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that the rule of tests/golden/README.md gives for a state name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("freqs"):
        value = 2 * math.pi * rng.standard_normal(shape)
    elif name.endswith("phases"):
        value = 2 * math.pi * rng.random(shape)
    elif name.endswith("gain"):
        value = 0.5 + 0.25 * rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(value, np.float32))


@pytest.fixture(scope="session")
def fill_by_rule() -> Callable[..., torch.nn.Module]:
    """Fill a module's state by the rule, in place; returns the module."""

    def fill(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
        state = {name: draw_by_rule(prefix + name, tuple(v.shape)) for name, v in module.state_dict().items()}
        module.load_state_dict(state)
        return module

    return fill


@pytest.fixture(scope="session")
def speak() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Fill layers that start at zero, so that the whole network takes part; returns the module."""

    def fill(net: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for p in net.parameters():
                if p.abs().max() == 0:
                    p.normal_(0, 0.2)
        return net

    return fill


@pytest.fixture(scope="session")
def tiny_digits() -> Callable[..., Any]:
    """Settings of a run of a second: 64 images of 8x8 through a network of two resolutions."""

    def settings(**changes: Any) -> Any:
        from edm2.presets import get_preset

        config = get_preset("digits")
        network = dataclasses.replace(config.network, model_channels=8, num_blocks=1, channels_per_head=8)
        short = {"num_images": 64, "batch_size": 8, "log_images": 16, "snapshot_images": 16}
        return dataclasses.replace(config, **{"network": network, **short, **changes})

    return settings


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Callable[..., Any]) -> Path:
    """The finished run of `tiny_digits`, trained once; copy it before changing anything in it."""
    from edm2.train import train

    out = tmp_path_factory.mktemp("digits") / "run"
    train(tiny_digits(), out, quiet=True)
    return out


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Load a golden file: .npz as a dict of arrays, .json as it is."""

    def load(name: str) -> Any:
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as data:
            return dict(data)

    return load


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Any, Any], float]:
    """max |difference| / max |reference|."""

    def error(value: Any, reference: Any) -> float:
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        reference = np.asarray(reference)
        assert value.shape == reference.shape, (value.shape, reference.shape)
        return float(np.abs(value - reference).max() / np.abs(reference).max())

    return error
