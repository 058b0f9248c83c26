import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch

from edm2.commands.train import run
from edm2.data import open_dataset
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
        # Ten classes, two rows, 8 pixels and a gap of one, each eight times as large; above them the classes, below
        # them as many real images.
        height = 8 * (2 * 9 - 1)
        assert grid.size == (8 * (10 * 9 - 1), _NAME_SIZE + 6 + 2 * height + 16)
        shown = np.asarray(grid.convert("L"))[-height::8, ::8]
    digits = open_dataset("digits")
    for column in range(10):
        real = digits.images(np.flatnonzero(digits.labels(np.arange(len(digits))) == column))[:, 0]
        first, second = shown[:8, 9 * column : 9 * column + 8], shown[9:17, 9 * column : 9 * column + 8]
        assert np.array_equal(first, real[0])
        assert np.array_equal(second, real[len(real) // 2])


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


def test_pairs_are_shown_beside_condition_and_truth_and_loggers_get_the_picture(tmp_path):
    from edm2.data import ArrayDataset, PairedDataset

    rng = np.random.default_rng(0)
    conditions = rng.normal(size=(16, 1, 8, 8)).astype(np.float32)
    targets = (conditions + rng.normal(size=(16, 2, 8, 8))).astype(np.float32)
    data = PairedDataset(ArrayDataset(targets), ArrayDataset(conditions))
    told = []

    class Logger:
        def start(self, *_): ...
        def finish(self): ...

        def log(self, num_images, values):
            told.append(("log", num_images))

        def image(self, num_images, name, picture):
            told.append((name, num_images, picture.shape, picture.dtype))

        def histogram(self, num_images, name, values):
            told.append((name, num_images, values.size))

    live = LiveSamples(every=40, num_samples=3, num_steps=2)
    config = dataclasses.replace(tiny(), validation="0.25", snapshot_images=40)
    train(config, tmp_path / "run", dataset=data, quiet=True, on_step=live, loggers=[Logger()])
    # Condition, sample and truth; the latter two have two channels side by side, and share their colours.
    side = 8 * 8
    width, height = 3 * (2 * side + 8) - 8, 3 * side + 2 * 4
    assert ("samples", 40, (height, width, 3), np.uint8) in told
    with PIL.Image.open(LiveSamples.path(tmp_path / "run", 40)) as grid:
        assert grid.size == (width, height)
    assert ("weights/unet.out_gain", 40, 1) in told


def test_fields_get_the_colours_of_their_reference_and_missing_values_are_grey():
    from edm2.report.grids import case_grid

    truth = np.array([0.0, 1.0, 2.0, np.nan], np.float32).reshape(1, 1, 2, 2)
    grid = np.asarray(case_grid([(truth / 2, truth), (truth, truth)], tile=2))[..., :3].astype(int)
    shown, low = grid[:2], grid[-2:]
    assert (shown[0, 0] == low[0, 0]).all()
    assert (shown[1, 0] == low[0, 1]).all()  # half of the highest value is the middle one
    assert not (low[0, 1] == low[1, 0]).all()
    assert (low[1, 1] == 128).all()
