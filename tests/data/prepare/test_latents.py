"""With a stand-in for the autoencoder; tests/integrations has diffusers' own."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edm2.data import ArrayDataset, MirroredDataset, PairedDataset, open_dataset
from edm2.data.autoencoder import load_autoencoder
from edm2.data.prepare import latents
from edm2.data.prepare.latents import decode_latents, encode_latents
from edm2.extras import MissingExtra

RNG = np.random.default_rng(0)
DATA = ArrayDataset(
    RNG.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8), np.arange(7) % 3, class_names=("a", "b", "c")
)


class Halves:
    """Mean: the 2x2 means of the channels. Standard deviation: a tenth of their number."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(4, 4))

    def __init__(self, weight=1.0):
        self.weight = weight

    def state_dict(self):
        return {"weight": torch.tensor([self.weight])}

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 2) * self.weight
        std = torch.tensor([0.0, 0.1, 0.2])[:, None, None].expand_as(mean)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))

    def decode(self, x):
        return SimpleNamespace(sample=torch.nn.functional.interpolate(x / self.weight, scale_factor=2))


def pooled(scale, shift):
    x = DATA.images(np.arange(7)).astype(np.float64) / 255 * scale + shift
    return x.reshape(7, 3, 4, 2, 4, 2).mean((3, 5))


@pytest.mark.parametrize(("pixel_range", "scale", "shift"), [("zero-one", 1, 0), ("minus-one-one", 2, -1)])
def test_means_then_standard_deviations(tmp_path, monkeypatch, pixel_range, scale, shift):
    monkeypatch.setattr(latents, "_CHUNK_IMAGES", 3)
    done = encode_latents(
        DATA, tmp_path / "x.zip", Halves(), batch_size=2, pixel_range=pixel_range, quiet=True
    )
    data = open_dataset(done.path)
    assert (data.image_shape, data.dtype, data.class_names) == ((6, 4, 4), np.float32, ("a", "b", "c"))
    assert data.labels(np.arange(7)).tolist() == DATA.labels(np.arange(7)).tolist()
    stored = data.images(np.arange(7))
    expected = pooled(scale, shift)
    assert np.allclose(stored[:, :3], expected, atol=1e-6)
    assert np.allclose(stored[:, 3:], np.array([0, 0.1, 0.2])[:, None, None])
    # The moments are those of what training draws: the spread of the means, and that around them.
    assert done.mean == pytest.approx(expected.mean((0, 2, 3)), abs=1e-6)
    variance = expected.var((0, 2, 3)) + np.square([0, 0.1, 0.2])
    assert done.std == pytest.approx(np.sqrt(variance), rel=1e-5)


def test_work_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_CHUNK_IMAGES", 3)
    encode_latents(DATA, tmp_path / "whole.zip", Halves(), quiet=True)

    class Dies(Halves):
        def encode(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        encode_latents(DATA, tmp_path / "cut.zip", Dies(), quiet=True)
    with pytest.raises(ValueError, match=r"holds unfinished work with other settings \(autoencoder was"):
        encode_latents(DATA, tmp_path / "cut.zip", Halves(2.0), quiet=True)
    done = encode_latents(DATA, tmp_path / "cut.zip", Halves(), quiet=True)
    assert encode_latents(DATA, tmp_path / "cut.zip", Halves(), quiet=True) == done
    assert (tmp_path / "cut.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


@pytest.mark.parametrize("means", [False, True])
def test_decoding_undoes_encoding(tmp_path, monkeypatch, means):
    monkeypatch.setattr(latents, "_CHUNK_IMAGES", 3)
    flat = np.repeat(np.repeat(DATA.images(np.arange(7))[:, :, ::2, ::2], 2, 2), 2, 3)
    data = PairedDataset(ArrayDataset(flat, np.arange(7) % 3), vectors=np.arange(14).reshape(7, 2) / 3)
    done = encode_latents(data, tmp_path / "x.zip", Halves(), means=means, quiet=True)
    assert open_dataset(done.path).image_shape == (3 if means else 6, 4, 4)
    made = decode_latents(open_dataset(done.path), tmp_path / "y", Halves(), batch_size=2, quiet=True)
    again = decode_latents(open_dataset(done.path), tmp_path / "y", Halves(), batch_size=2, quiet=True)
    assert again == made
    for back in (open_dataset(done.path), open_dataset(made.path)):
        assert np.array_equal(back.labels(np.arange(7)), np.arange(7) % 3)
        assert np.array_equal(back.vectors(np.arange(7)), data.vectors(np.arange(7)))
    pictures = open_dataset(made.path).images(np.arange(7)).astype(int)
    assert np.abs(pictures - flat).max() <= 1  # decoders truncate to bytes
    with pytest.raises(
        ValueError, match="has 3 channels of uint8, the autoencoder decodes 3 of float32, or 6 with"
    ):
        decode_latents(open_dataset(made.path), tmp_path / "z", Halves(), quiet=True)


def test_mirrored_copies_follow_the_images(tmp_path):
    data = PairedDataset(DATA, DATA)
    both = MirroredDataset(data)
    rows = np.arange(14)
    expected = np.concatenate([DATA.images(np.arange(7)), DATA.images(np.arange(7))[..., ::-1]])
    for found in (both.images(rows), both.conditions.images(rows), *both.drawn(rows, seed=0, position=0)):
        assert np.array_equal(found, expected)
    assert both.labels(rows).tolist() == [*(np.arange(7) % 3), *(np.arange(7) % 3)]
    stored = open_dataset(encode_latents(both, tmp_path / "x.zip", Halves(), quiet=True).path).images(rows)
    assert np.allclose(stored[7:], stored[:7, ..., ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            np.zeros((1, 1, 8, 8), np.uint8),
            {},
            "1 channels of uint8, the autoencoder takes 3 of uint8: convert it first",
        ),
        (np.zeros((1, 3, 8, 8), np.float32), {}, "3 channels of float32, the autoencoder takes 3 of uint8"),
        (np.zeros((1, 3, 8, 7), np.uint8), {}, "are 8x7, the autoencoder needs multiples of 2: convert"),
        (np.zeros((1, 3, 8, 8), np.uint8), {"batch_size": 0}, "batch_size 0 must be at least 1"),
        (
            np.zeros((1, 3, 8, 8), np.uint8),
            {"pixel_range": "x"},
            "pixel_range 'x' must be zero-one or minus-one-one",
        ),
    ],
)
def test_errors(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        encode_latents(ArrayDataset(data), tmp_path / "x", Halves(), quiet=True, **options)


def test_latents_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="gave latents that are not finite: use --dtype float32"):
        encode_latents(DATA, tmp_path / "x", Halves(float("inf")), quiet=True)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"latents needs the package 'diffusers', .*\.\[latent\]"):
        load_autoencoder("x", torch.device("cpu"))
