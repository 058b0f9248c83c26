"""Latent models end to end with diffusers' real AutoencoderKL, a small one made here."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from edm2.cli import main  # noqa: E402
from edm2.data import FloatCoding, LatentDecoder  # noqa: E402
from edm2.diffusion import build_denoiser, save_model  # noqa: E402
from edm2.generate import ImageGenerator, read_images  # noqa: E402
from edm2.hub import EDM2Pipeline  # noqa: E402
from edm2.interop.model_info import LATENT_MEAN, LATENT_STD  # noqa: E402
from edm2.train import DataConfig, train  # noqa: E402
from edm2.train.coding import Coding  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(0.5)  # within [0, 1], as a trained one is
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(
            8, 4, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
        )  # fmt: skip
    torch.nn.init.constant_(denoiser.unet.out_gain, 0.5)
    coding = Coding(kind="latents", values=FloatCoding(mean=LATENT_MEAN, std=LATENT_STD), num_channels=4)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return save_model(path, denoiser.options, denoiser.state_dict(), {"coding": coding.to_json()})


@torch.no_grad()
def expected_pictures(vae: Any, model: Path, seeds: list[int]) -> np.ndarray:
    """The coding of the released models, written out: z * d / 0.5 + m, decoded, clamped to [0, 1], truncated."""
    z = ImageGenerator.load(model).latents(seeds, num_steps=2)
    mean, std = (
        torch.tensor(v).reshape(1, 4, 1, 1) for v in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))
    )
    pixels = vae.decode(z * std / 0.5 + mean).sample
    return np.floor(pixels.clamp(0, 1).double().numpy() * 255).astype(np.uint8)


def test_pictures_of_a_latent_model(vae: tuple[Any, Path], model: Path, tmp_path: Path) -> None:
    words = [
        "sample",
        str(model),
        "--vae",
        str(vae[1]),
        "--num-steps",
        "2",
        "--device",
        "cpu",
        "--seeds",
        "0-4",
    ]
    main([*words, "--vae-batch", "2", "--out", str(tmp_path / "s")])
    made = read_images([tmp_path / "s" / f"{seed:06d}.png" for seed in range(5)])
    expected = expected_pictures(vae[0], model, [0, 1, 2, 3, 4])
    assert made.shape == (5, 3, 16, 16)
    assert expected.std() > 5
    assert (
        np.abs(made.astype(int) - expected.astype(int)).max() <= 1
    )  # truncation, after another batch's rounding
    assert (tmp_path / "s" / "grid.png").exists()
    decoder = json.loads((tmp_path / "s" / "samples.json").read_text())["model"]["decoder"]
    assert decoder["pixel_range"] == "zero-one"


def test_other_autoencoders_do_not_continue(vae: tuple[Any, Path], model: Path, tmp_path: Path) -> None:
    words = [
        "sample",
        str(model),
        "--vae",
        str(vae[1]),
        "--num-steps",
        "2",
        "--device",
        "cpu",
        "--seeds",
        "0",
    ]
    main([*words, "--out", str(tmp_path / "s")])
    with pytest.raises(SystemExit):
        main([*words, "--pixel-range", "minus-one-one", "--out", str(tmp_path / "s")])


def test_in_python(vae: tuple[Any, Path], model: Path) -> None:
    generator = ImageGenerator.load(model, decoder=LatentDecoder.load(vae[1], batch_size=3))
    images = generator.images([7, 8], num_steps=2)
    assert np.abs(images.astype(int) - expected_pictures(vae[0], model, [7, 8])).max() <= 1


@pytest.mark.parametrize("by", ["object", "folder"])
def test_in_the_pipeline(vae: tuple[Any, Path], model: Path, by: str) -> None:
    pipe = EDM2Pipeline.from_pretrained(model.parent, vae=vae[0] if by == "object" else vae[1])
    images = pipe(seeds=[7, 8], num_inference_steps=2, class_labels=[7 % 3, 8 % 3], output_type="pt").images
    made = (images * 255).round().numpy().astype(int)
    assert np.abs(made - expected_pictures(vae[0], model, [7, 8])).max() <= 1


def test_an_autoencoder_that_cannot_be_had(model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "s"
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(model), "--vae", str(tmp_path / "none"), "--device", "cpu", "--out", str(out)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "could not be loaded" in told
    assert "or write the latents themselves: edm2 sample --latents" in told
    assert not out.exists()


def test_the_studio_shows_the_decoded_pictures_of_the_command(
    vae: tuple[Any, Path], tmp_path: Path, tiny_digits: Any
) -> None:
    from edm2.studio.choices import Choice
    from edm2.studio.workbench import Workbench

    rng = np.random.default_rng(0)
    np.save(tmp_path / "pictures.npy", rng.integers(0, 256, (16, 3, 16, 16), np.uint8))
    words = ["data", "encode", str(tmp_path / "pictures.npy"), "--vae", str(vae[1])]
    main([*words, "--out", str(tmp_path / "latents.zip")])
    coding = DataConfig(coding="latents", mean=(0.0,) * 4, std=(1.0,) * 4)
    config = tiny_digits(data=str(tmp_path / "latents.zip"), num_images=32, dataset=coding)
    train(config, tmp_path / "run", quiet=True)
    bench = Workbench(tmp_path / "run", vae=str(vae[1]))
    chosen = Choice(sigma_rel=0.1, num_images=32, num_steps=2, count=3)
    images = bench.images(chosen)
    assert (images.dtype, images.shape) == (np.uint8, (3, 3, 16, 16))
    assert bench.path(chosen)[0][1].shape == (3, 16, 16)
    assert bench.noise(chosen) is not None
    main([*shlex.split(bench.command(chosen))[1:-1], str(tmp_path / "made")])
    made = read_images([tmp_path / "made" / f"{seed:06d}.png" for seed in range(3)])
    assert np.array_equal(made, images)
