"""Features of blocks, and what a linear classifier reads in them."""

import json

import numpy as np
import pytest
import torch

from edm2.cli import main
from edm2.data import open_dataset
from edm2.diffusion import Denoiser
from edm2.evaluation.probe import fit_linear, run_probe
from edm2.generate import ImageGenerator
from edm2.generate.lengths import load_raw
from edm2.nn import keyed_normal
from edm2.train.checkpoint import StoredTensors, newest


@pytest.fixture(scope="module")
def generator(digits_run):
    return ImageGenerator.load(digits_run)


def test_features_are_the_pooled_outputs_of_a_block(generator):
    images = open_dataset("digits").images(np.arange(5))
    found = generator.features(images, 0.3, "enc.8x8_block0", seed=2)
    x = generator.coding.encode(torch.from_numpy(images), torch.arange(5), seed=2)
    noisy = x + 0.3 * keyed_normal(torch.arange(5), (1, 8, 8), seed=2, stream=1)
    unet = generator.denoiser.unet
    c_in = 1 / np.sqrt(0.3**2 + 0.5**2)
    c_noise = torch.full([5], np.log(0.3) / 4, dtype=torch.float32)
    first = unet.enc["8x8_conv"](torch.cat([c_in * noisy, torch.ones_like(noisy)], dim=1))
    expected = unet.enc["8x8_block0"](first, unet.embed(c_noise, None, torch.float32)).mean(dim=(2, 3))
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    quarters = generator.features(images, 0.3, "enc.8x8_block0", cells=2, seed=2).reshape(5, -1, 4)
    assert quarters.mean(axis=2) == pytest.approx(found, abs=1e-5)
    assert generator.blocks[0] == "enc.8x8_conv"
    assert generator.blocks[-1].startswith("dec.8x8_block")
    # Nothing stays behind in the network, and labels take part where they are given.
    assert not any(module._forward_hooks for module in unet.modules())
    labelled = generator.features(images, 0.3, "dec.8x8_block0", labels=np.arange(5), seed=2)
    assert not np.allclose(labelled, generator.features(images, 0.3, "dec.8x8_block0", seed=2))


def test_what_has_no_features(generator):
    images = open_dataset("digits").images(np.arange(2))
    with pytest.raises(ValueError, match=r"no block 'enc.9': the blocks are enc.8x8_conv, "):
        generator.features(images, 0.3, "enc.9")
    with pytest.raises(ValueError, match=r"noise level 0 must be above 0"):
        generator.features(images, 0, "enc.8x8_conv")
    own = ImageGenerator(Denoiser(torch.nn.Identity(), img_resolution=8, img_channels=1), generator.coding)
    with pytest.raises(ValueError, match="Identity is not a U-Net of edm2: register forward hooks"):
        _ = own.blocks


def test_a_line_is_read_and_noise_is_not():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3)) * [1, 100, 0.01]
    labels = (features[:, 2] > 0).astype(int)  # in the smallest direction: features are standardised
    assert (fit_linear(features[:300], labels[:300], 1.0)(features[300:]) == labels[300:]).mean() > 0.95
    noise = rng.integers(0, 2, 400)
    assert (fit_linear(features[:300], noise[:300], 1.0)(features[300:]) == noise[300:]).mean() < 0.65


def test_the_test_images_choose_nothing(generator):
    data = open_dataset("digits")
    rows = np.arange(120)
    train = (data.images(rows), data.labels(rows))
    probes = [
        run_probe(generator, train, test, sigmas=(0.1, 0.5), quiet=True)
        for test in (train, (train[0], (train[1] + 1) % 10))  # with right labels, and with wrong ones
    ]
    assert probes[0].accuracy > 0.8  # fitted to these very images
    assert probes[1].accuracy < 0.1
    assert (probes[0].block, probes[0].sigma) == (probes[1].block, probes[1].sigma)
    best = np.unravel_index(probes[0].validation.argmax(), probes[0].validation.shape)
    assert probes[0].validation[best] < 0.8  # of images that were held back
    for wrong, told in (
        ((train[0], np.zeros(120, int)), "fewer than two"),
        ((train[0][:5], train[1][:5]), "too few"),
    ):
        with pytest.raises(ValueError, match=told):
            run_probe(generator, wrong, train, quiet=True)
    with pytest.raises(ValueError, match="no noise level"):
        run_probe(generator, train, train, sigmas=(), quiet=True)


def test_raw_weights_are_those_of_the_newest_checkpoint(digits_run, tmp_path):
    stored = StoredTensors(newest(digits_run / "checkpoints"))
    state = load_raw(digits_run).denoiser.state_dict()
    assert len(stored.names("model")) > 20
    assert all(torch.equal(state[name], stored.read("model", name)) for name in stored.names("model"))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint with raw weights"):
        load_raw(tmp_path / "run")


def test_command(digits_run, tmp_path, capsys):
    options = ["--sigmas", "0.2", "--samples", "100", "--out", str(tmp_path / "probe.json")]
    main(["probe", str(digits_run), "--raw", *options])
    shown = capsys.readouterr()
    assert "accuracy on test images: " in shown.out
    assert "100 training and 100 test images (the data's own test split)" in shown.err
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["weights"] == "raw"
    assert found["accuracy"] > 0.2
    assert f"{found['block']:<18}" in shown.out
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["probe", str(digits_run), "--out", str(tmp_path / "other.json")])
    assert (
        "other.json exists and is not a result of `edm2 probe`: choose another --out"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["probe", str(digits_run), "--raw", "--ema", "0.1", *options])
    assert "--raw and --ema 0.1 exclude each other" in capsys.readouterr().err
