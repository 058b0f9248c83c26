"""The real library `diffusers`, with a small autoencoder made here."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from edm2.cli import main  # noqa: E402
from edm2.data import ArrayDataset, open_dataset  # noqa: E402
from edm2.data.autoencoder import load_autoencoder  # noqa: E402
from edm2.data.prepare.latents import encode_latents  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library
CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    model.save_pretrained(tmp_path / "vae")
    return model.eval()


@torch.no_grad()
def test_latents_are_those_of_the_autoencoder(vae, tmp_path):
    loaded = load_autoencoder(tmp_path / "vae", CPU)
    done = encode_latents(ArrayDataset(IMAGES), tmp_path / "x.zip", loaded, batch_size=2, quiet=True)
    stored = torch.from_numpy(open_dataset(done.path).images(np.arange(5)))
    expected = vae.encode(torch.from_numpy(IMAGES) / 255).latent_dist
    assert stored.shape == (5, 8, 8, 8)
    assert torch.allclose(stored, torch.cat([expected.mean, expected.std], dim=1), atol=1e-5)


def test_the_command_says_how_to_train_on_them(vae, tmp_path, capsys):
    np.save(tmp_path / "x.npy", IMAGES)
    vae_of_a_pipeline = tmp_path / "pipeline"
    vae_of_a_pipeline.mkdir()
    (tmp_path / "vae").rename(vae_of_a_pipeline / "vae")
    out = tmp_path / "latents.zip"
    words = ["data", "encode", str(tmp_path / "x.npy"), "--out", str(out), "--vae", str(vae_of_a_pipeline)]
    main([*words, "--device", "cpu"])
    text = capsys.readouterr().out
    assert f"{out}: 5 images of 8 channels" in text
    assert f"train with: --data {out} --dataset.coding latents --dataset.mean" in text
    assert open_dataset(out).image_shape == (8, 8, 8)


def test_latent_pairs_from_pictures_to_pictures(vae, tmp_path, monkeypatch, capsys):
    """The commands of docs/pairs.md: encode both, train with decoded samples, sample from new conditions, decode."""
    monkeypatch.chdir(tmp_path)
    np.savez("pairs.npz", images=IMAGES, conditions=IMAGES[:, :, ::-1])
    np.save("new.npy", IMAGES[:2, :, ::-1])
    main(
        ["data", "encode", "pairs.npz", "--out", "latents.zip", "--vae", "vae", "--mirror", "--device", "cpu"]
    )
    *_, told = capsys.readouterr().out.splitlines()
    assert "--data latents.zip --condition latents-conditions.zip --dataset.coding latents" in told
    conditions = open_dataset("latents-conditions.zip")
    assert (len(conditions), conditions.image_shape) == (10, (4, 8, 8))
    network = "--network.model-channels 8 --network.channel-mult 1 --network.num-blocks 1 --network.attn-resolutions 8"
    options = f"{network} --network.channels-per-head 8 --images 16 --batch 8 --device cpu --preset digits"
    live = "--sample-images 16 --sample-vae vae"
    main(f"train {told.removeprefix('train with: ')} {options} {live} --out run".split())
    assert len(list((tmp_path / "run" / "progress").iterdir())) == 1
    main(["data", "encode", "new.npy", "--out", "new.zip", "--vae", "vae", "--means", "--device", "cpu"])
    main(
        [
            "sample",
            "run",
            "--conditions",
            "new.zip",
            "--vae",
            "vae",
            "--seeds",
            "0-1",
            "--num-steps",
            "2",
            "--out",
            "made.zip",
        ]
    )
    main(
        [
            "sample",
            "run",
            "--conditions",
            "new.zip",
            "--latents",
            "--seeds",
            "0-1",
            "--num-steps",
            "2",
            "--out",
            "made.npz",
        ]
    )
    main(["data", "decode", "made.npz", "--out", "decoded.zip", "--vae", "vae", "--device", "cpu"])
    pictures = [open_dataset(name).images(np.arange(2)) for name in ("made.zip", "decoded.zip")]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--sample-vae vae", "--sample-vae vae has no effect without --sample-images"),
        (
            "--sample-vae vae --sample-images 8",
            "is for latents, and --dataset.coding is measured: leave it out",
        ),
        (
            "--sample-vae vae --sample-images 8 --dataset.coding latents --dataset.mean 0 0 --dataset.std 1 1",
            "decodes latents of 4 channels, and --dataset.mean has 2 values: name the one that encoded",
        ),
    ],
)
def test_decoders_of_samples_that_do_not_fit(options, told, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(f"train --preset digits --out run {options}".split())
    assert told in capsys.readouterr().err


def test_autoencoders_that_cannot_be_loaded(vae, tmp_path):
    with pytest.raises(
        ValueError, match=r"could not be loaded .*give the name of an AutoencoderKL on the hub"
    ):
        load_autoencoder(tmp_path / "none", CPU)
    # Pickled weights are never read.
    torch.save(vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        load_autoencoder(tmp_path / "vae", CPU)
