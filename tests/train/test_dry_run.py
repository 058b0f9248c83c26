import dataclasses

import pytest

import edm2.commands.train as command
from edm2.presets import get_preset
from edm2.train.dry_run import DryRun, dry_run

COST = DryRun(
    num_images=7200,
    num_params=1_000_000,
    flops=2e9,
    state_bytes=24_000_000,
    peak_bytes=3_200_000_000,
    snapshot_bytes=80_000_000,
    checkpoint_bytes=40_000_000,
    images_per_second=2.0,
)


def test_words():
    text = COST.describe(machines=8)
    assert "1,000,000" in text
    assert "24 MB for weights" in text
    assert "3.2 GB at most" in text
    assert "80 MB of snapshots, 40 MB of checkpoints" in text
    assert "2.0 images/s here, 0.024 Tflop/s" in text
    assert "1 h 00 min for 7,200 images here" in text
    assert "7 min 30 s on 8 such machines" in text
    assert "such machines" not in COST.describe()


def test_measures_the_digits_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(get_preset("digits"), batch_size=4)
    cost = dry_run(config, steps=1)
    assert cost.num_params == 1_008_239
    assert cost.flops == pytest.approx(0.0292e9, rel=0.01)
    # Weights, gradients, two moments, two averages and their windows in float32; the base of the averages in bfloat16.
    assert cost.state_bytes == (8 * 4 + 2) * 1_008_239
    times = -(-config.num_images // config.snapshot_images)
    assert cost.snapshot_bytes == times * 2 * 4 * 1_008_239
    assert cost.checkpoint_bytes == 2 * (7 * 4 + 2) * 1_008_239
    assert cost.peak_bytes > cost.state_bytes
    assert cost.seconds == pytest.approx(config.num_images / cost.images_per_second)
    assert not list(tmp_path.iterdir())


def test_a_run_shorter_than_what_is_measured():
    config = dataclasses.replace(get_preset("digits"), batch_size=4, num_images=5)
    cost = dry_run(config, steps=1)
    assert (cost.num_images, cost.images_per_second > 0) == (5, True)


@pytest.mark.parametrize("option", ["--machines", "--sample-images"])
def test_options_are_checked_before_the_work(monkeypatch, option):
    monkeypatch.setattr(command, "dry_run", None)
    with pytest.raises(ValueError, match=f"{option} 0 must be at least 1"):
        command.run("edm2 train", ["--preset", "digits", "--out", "x", "--dry-run", option, "0"])


def test_bad_input():
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        dry_run(get_preset("digits"), steps=0)
    with pytest.raises(ValueError, match="machines 0 must be at least 1"):
        COST.describe(0)
