import dataclasses
import math

import numpy as np
import pytest
import torch

from edm2.ema import PowerEMA, Target, gamma_to_sigma_rel, reconstruct
from edm2.presets import get_preset
from edm2.train import traditional_decay
from edm2.train.with_config import traditional_average, with_config

# Width of config A's average in runs of up to 1000 M images.
SHORT_RUN = gamma_to_sigma_rel(math.log(2) / 0.05 - 1)


def test_config_g_is_the_preset_itself():
    settings = get_preset("digits")
    optimizer = dataclasses.replace(settings.optimizer, betas=(0.9, 0.95), eps=1e-6)
    for own in (settings, dataclasses.replace(settings, optimizer=optimizer, loss_scaling=1024.0)):
        assert with_config(own, "G") == own


def test_what_changes_from_step_to_step():
    settings = get_preset("digits")
    ladder = {letter: with_config(settings, letter) for letter in "ABCDEFG"}
    lr = settings.optimizer.ref_lr
    expected = {"A": 0.01, "B": 0.02, "C": 0.02, "D": 1, "E": 1, "F": 1, "G": 1}
    assert {k: s.optimizer.ref_lr / lr for k, s in ladder.items()} == pytest.approx(expected)
    assert [k for k, s in ladder.items() if s.optimizer.ref_batches] == ["E", "F", "G"]
    assert [k for k, s in ladder.items() if s.optimizer.betas == (0.9, 0.999)] == ["A"]
    assert [k for k, s in ladder.items() if (s.loss.p_mean, s.loss.p_std) == (-1.2, 1.2)] == ["A"]
    assert [k for k, s in ladder.items() if s.loss_scaling == 100] == ["A", "B", "C"]
    assert {k: s.optimizer.eps * s.loss_scaling for k, s in ladder.items()} == pytest.approx(
        dict.fromkeys("ABCDEFG", 1e-8)
    )
    same = {"num_images", "batch_size", "seed", "network", "dataset", "ema"}
    assert all(getattr(s, name) == getattr(settings, name) for s in ladder.values() for name in same)


@pytest.mark.parametrize(
    ("preset", "of_g"), [("edm2-img512-s", 0.0), ("edm2-img512-m", 0.1), ("digits", None)]
)
def test_dropout_is_the_configurations_own(preset, of_g):
    settings = get_preset(preset)
    found = {letter: with_config(settings, letter).network.dropout for letter in "ABCDEFG"}
    # None: the network's own, 0.1 in A to F.
    assert found == dict.fromkeys("ABCDEF", of_g or None) | {"G": of_g}


def test_runs_of_different_configurations_are_different_runs():
    settings = get_preset("digits")
    assert len({with_config(settings, letter).run_id("x") for letter in "ABCDEFG"}) == 7


def test_traditional_average_is_a_power_function_of_short_runs():
    for t in (44_000, 1e9):
        profile, power = traditional_average().at(t), Target.power(SHORT_RUN).at(t)
        tau = np.linspace(0, t, 100)
        np.testing.assert_allclose(profile.cumulative(tau), power.cumulative(tau), atol=1e-6)


@pytest.mark.parametrize("end", [800, 2000])
def test_traditional_average_is_what_its_updates_make(tmp_path, end):
    """Of weights that walk at random; an update every million images."""
    model = torch.nn.Linear(40, 40, bias=False)
    ema = PowerEMA(model, (0.03, 0.05, 0.1, 0.2), clock="images")
    generator = torch.Generator().manual_seed(0)
    average = torch.zeros(40, 40, dtype=torch.float64)
    for t in range(1, end + 1):
        with torch.no_grad():
            model.weight.add_(0.002 * torch.randn(40, 40, generator=generator))
        ema.update(t * 1e6)
        average.lerp_(model.weight.detach().double(), 1 - traditional_decay(t * 1e6, batch_size=1_000_000))
        if t % 100 == 0:
            ema.snapshot(tmp_path)
    found = reconstruct(tmp_path, target=traditional_average())
    error = (found.tensors["weight"] - average).norm() / average.norm()
    assert error < max(0.005, found.expected_error)
    if end > 1000:
        short = reconstruct(tmp_path, SHORT_RUN).tensors["weight"]
        assert (short - average).norm() > 5 * error * average.norm()


def test_bad_input():
    settings = get_preset("digits")
    with pytest.raises(ValueError, match="config 'H' is not one of A, B, C, D, E, F, G"):
        with_config(settings, "H")
    with pytest.raises(ValueError, match="these settings are of config C"):
        with_config(dataclasses.replace(settings, config="C"), "D")
