"""Latent models without diffusers: what is refused before work starts, and latents written as they are."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import INFO, latent_coding, small_denoiser, small_generator, small_model

from edm2.cli import main
from edm2.data import LatentDecoder
from edm2.diffusion import save_model
from edm2.generate import ImageGenerator

QUICK = ["--num-steps", "2", "--seeds", "0-2", "--device", "cpu"]


class Bright:
    """A stand-in for an autoencoder: pixels of 0 or 1, by the sign of the first channel."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, latent_channels: int = 2) -> None:
        self.config = SimpleNamespace(out_channels=3, latent_channels=latent_channels)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def decode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(sample=(x[:, :1] > 5.0).float().expand(-1, 3, -1, -1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    denoiser = small_denoiser(channels=2)
    info = {**INFO, "coding": latent_coding().to_json()}
    return save_model(tmp_path / "latent.safetensors", denoiser.options, denoiser.state_dict(), info)


def test_a_generator_decodes_what_its_coding_gives(model: Path) -> None:
    generator = ImageGenerator.load(model, decoder=LatentDecoder(Bright()))
    plain = ImageGenerator.load(model)
    assert (generator.pixel_channels, plain.pixel_channels) == (3, 0)
    latents = plain.images([0, 1, 2], num_steps=2)
    assert latents.dtype == np.float32
    images = generator.images([0, 1, 2], num_steps=2)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.repeat((latents[:, :1] > 5.0) * np.uint8(255), 3, axis=1))
    assert {key: v for key, v in generator.identity().items() if key != "decoder"} == plain.identity()


def test_without_diffusers_nothing_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(model), *QUICK, "--out", str(tmp_path / "s")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "latents needs the package 'diffusers'" in told
    assert "with its address, or write the latents themselves: edm2 sample --latents" in told
    assert not (tmp_path / "s").exists()
    main(["sample", str(model), *QUICK, "--latents", "--out", str(tmp_path / "s.npz")])
    with np.load(tmp_path / "s.npz", allow_pickle=False) as content:
        assert np.allclose(
            content["arr_0"], ImageGenerator.load(model).images([0, 1, 2], num_steps=2), atol=1e-4
        )


@pytest.mark.parametrize(
    ("latent", "words", "told"),
    [
        (True, ["--latents", "--vae", "x"], "--vae and --latents exclude each other"),
        (True, ["--latents", "--pixel-range", "minus-one-one"], "--pixel-range and --latents exclude each other"),
        (False, ["--vae", "x"], "--vae is for latent models, and"),
        (False, ["--latents"], "--latents is for latent models, and"),
        (False, ["--pixel-range", "minus-one-one"], "makes pixels: leave it out"),
    ],
)  # fmt: skip
def test_bad_words(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    latent: bool,
    words: list[str],
    told: str,
) -> None:
    chosen = model if latent else small_model(tmp_path / "pixels.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(chosen), *QUICK, *words, "--out", str(tmp_path / "s")])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_decoder_has_to_fit(model: Path) -> None:
    with pytest.raises(
        ValueError, match="decodes latents of 4 channels and the model's have 2: name the one"
    ):
        ImageGenerator.load(model, decoder=LatentDecoder(Bright(4)))
    pixels = small_generator()
    with pytest.raises(ValueError, match="the model makes pixels, not latents: leave the autoencoder out"):
        ImageGenerator(pixels.denoiser, pixels.coding, decoder=LatentDecoder(Bright()))
