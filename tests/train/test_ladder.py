import dataclasses
import math

import pytest

from edm2.ema import sigma_rel_to_gamma
from edm2.presets import get_preset
from edm2.train.ladder import TRADITIONAL_SIGMA_REL, with_config


def test_config_g_is_the_preset_itself():
    settings = get_preset("digits")
    assert with_config(settings, "G") == settings


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


def test_runs_of_different_configurations_are_different_runs():
    settings = get_preset("digits")
    assert len({with_config(settings, letter).run_id("x") for letter in "ABCDEFG"}) == 7


def test_traditional_average_is_a_power_function():
    # Half-life h = t / 20 at any time t: weights lose half of their share while t grows by ln 2 / 20 ... exactly,
    # d ln(share) / d ln t = -ln 2 / 0.05 = -(gamma + 1).
    assert float(sigma_rel_to_gamma(TRADITIONAL_SIGMA_REL)) + 1 == pytest.approx(math.log(2) / 0.05)


def test_bad_input():
    settings = get_preset("digits")
    with pytest.raises(ValueError, match="config 'H' is not one of A, B, C, D, E, F, G"):
        with_config(settings, "H")
    with pytest.raises(ValueError, match="these settings are of config C"):
        with_config(dataclasses.replace(settings, architecture="C"), "D")
