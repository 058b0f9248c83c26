import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch

from edm2.commands.train import run
from edm2.generate.live_samples import LiveSamples
from edm2.presets import get_preset
from edm2.report.grids import _NAME_SIZE
from edm2.train import train


def tiny():
    config = get_preset("digits")
    network = dataclasses.replace(config.network, model_channels=8, num_blocks=1, channels_per_head=8)
    return dataclasses.replace(config, num_images=40, batch_size=8, snapshot_images=40, network=network)


def test_grids_come_when_due_and_change_nothing(tmp_path):
    live = LiveSamples(every=16, sigma_rel=0.05, num_samples=20, num_steps=2)
    watched = train(tiny(), tmp_path / "a", quiet=True, on_step=live)
    plain = train(tiny(), tmp_path / "b", quiet=True)
    assert watched.read_bytes() == plain.read_bytes()
    found = sorted(p.name for p in (tmp_path / "a" / "progress").iterdir())
    assert found == ["000000000016.png", "000000000032.png", "000000000040.png"]
    with PIL.Image.open(LiveSamples.path(tmp_path / "a", 40)) as grid:
        # Ten classes, two rows, 8 pixels and a gap of one, each eight times as large; above them the classes.
        assert grid.size == (8 * (10 * 9 - 1), _NAME_SIZE + 6 + 8 * (2 * 9 - 1))


def test_the_grid_is_of_the_chosen_average(tmp_path):
    from edm2.generate import ImageGenerator

    made = {}

    def look(trainer):
        if trainer.num_images == 40:
            with trainer.ema.applied(trainer.denoiser, 0.05):
                generator = ImageGenerator(trainer.denoiser.eval(), trainer.coding, trainer.info)
                made["images"] = generator.images(range(10), num_steps=2)
            trainer.denoiser.train()

    live = LiveSamples(every=40, sigma_rel=0.05, num_samples=10, num_steps=2)

    def both(trainer):
        look(trainer)
        live(trainer)
        assert trainer.denoiser.training

    train(tiny(), tmp_path / "run", quiet=True, on_step=both)
    with PIL.Image.open(LiveSamples.path(tmp_path / "run", 40)) as grid:
        top = _NAME_SIZE + 6
        first = np.asarray(grid.convert("L"))[top : top + 8 * 8 : 8, : 8 * 8 : 8]
    assert torch.equal(torch.from_numpy(first.copy()), torch.from_numpy(made["images"][0, 0]))


def test_an_average_that_the_run_cannot_give_is_refused_before_it_starts(tmp_path):
    words = ["--preset", "digits", "--out", str(tmp_path / "run"), "--sample-images", "8"]
    with pytest.raises(
        ValueError, match=r"sigma_rel 0.001 cannot be made from the tracked ones, \(0.05, 0.1\)"
    ):
        run("edm2 train", [*words, "--sample-sigma-rel", "0.001"])
    assert not (tmp_path / "run").exists()
    for sigma_rel in (None, 0.05, 0.07):
        LiveSamples(every=1, sigma_rel=sigma_rel).check((0.05, 0.1))


def test_bad_options():
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        LiveSamples(every=0)
    with pytest.raises(ValueError, match=r"sigma_rel 0.5 is outside"):
        LiveSamples(every=1, sigma_rel=0.5)


def test_samples_that_are_not_finite_do_not_end_the_training(tmp_path, monkeypatch):
    def images(*_, **__):
        raise FloatingPointError("not finite")

    monkeypatch.setattr("edm2.generate.ImageGenerator.images", images)
    with pytest.warns(UserWarning, match="no samples after 40 images: not finite"):
        made = train(tiny(), tmp_path / "run", quiet=True, on_step=LiveSamples(every=40, num_steps=2))
    assert made.is_file()
