"""`dtype auto`: the faster precision, measured once and kept by the run."""

import dataclasses

import pytest

from edm2.presets import get_preset
from edm2.train import dry_run, session, train
from edm2.train.run_folder import read_config
from edm2.train.world import World

TINY = dataclasses.replace(
    get_preset("digits"),
    num_images=8,
    batch_size=4,
    dtype="auto",
    network=dataclasses.replace(
        get_preset("digits").network, model_channels=8, num_blocks=1, channels_per_head=8
    ),
)


@pytest.mark.parametrize(("gain", "dtype"), [(1.2, "bfloat16"), (1.02, "float32")])
def test_the_faster_precision_is_measured_once(gain, dtype, monkeypatch, tmp_path, capsys):
    original, rates = dry_run.dry_run, {"float32": 100.0, "bfloat16": 100.0 * gain}

    def measured(config, **kwargs):
        return dataclasses.replace(original(config, steps=1, **kwargs), images_per_second=rates[config.dtype])

    monkeypatch.setattr(dry_run, "dry_run", measured)
    train(TINY, tmp_path / "run", quiet=True)
    assert read_config(tmp_path / "run")["settings"]["dtype"] == dtype
    assert f"computes in {dtype}" in capsys.readouterr().err
    monkeypatch.setattr(session, "faster_dtype", None)
    train(dataclasses.replace(TINY, num_images=16), tmp_path / "run", quiet=True)
    assert read_config(tmp_path / "run")["settings"]["dtype"] == dtype


def test_a_dry_run_measures_it_too():
    assert dry_run.dry_run(TINY, steps=1).images_per_second > 0


def test_several_processes_must_be_told(tmp_path):
    world = World(rank=0, size=2, device="cpu")
    with pytest.raises(ValueError, match="dtype auto is not measured for several processes: choose float32"):
        session._measured_dtype(TINY, tmp_path, None, world)
