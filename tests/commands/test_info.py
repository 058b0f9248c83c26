"""What `edm2 info` says of a preset, a model, and a run that is under way."""

import dataclasses
import json
from pathlib import Path

import pytest

from edm2.commands.info import describe_path, describe_preset, describe_released
from edm2.diffusion import build_denoiser, save_model
from edm2.hub import save_pretrained
from edm2.presets import digits
from edm2.train import Stopped, train
from edm2.train.loop import Trainer

OPTIONS = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)


def test_preset() -> None:
    text = describe_preset("edm2-img64-s")
    assert "preset edm2-img64-s\nconfig      G, Magnitude-preserving fixed-function layers\n" in text
    assert "\nimages      3 x 64 x 64, 1000 classes\nparameters  280,209,381\n" in text
    assert "training    1,073,741,824 images in 524,288 steps of 2048" in text
    assert '"ref_lr": 0.01' in text
    assert "unet.enc.64x64_conv.weight" in text


def test_model(tmp_path: Path) -> None:
    denoiser = build_denoiser((4, 8), 2, **OPTIONS)  # type: ignore[arg-type]
    info = {
        "sigma_rel": 0.1,
        "num_images": 12345,
        "data": "mine",
        "expected_error": 0.00123,
        "license": "free",
    }
    file = save_model(tmp_path, denoiser.options, denoiser.state_dict(), info)
    text = describe_path(tmp_path)
    count = sum(p.numel() for p in denoiser.parameters())
    for line in (
        f"model       {file}, 0.",
        "images      2 x 4 x 8, unconditional",
        f"parameters  {count:,}",
        "EMA length  0.1",
        "images seen 12,345",
        "trained on  mine",
        "licence     free",
        "expected relative error of the reconstruction: 1.2e-03",
    ):
        assert line in text
    assert all(name in text for name in denoiser.state_dict())


def test_texts_from_the_file_cannot_command_the_terminal(tmp_path: Path) -> None:
    denoiser = build_denoiser(8, 1, **OPTIONS)  # type: ignore[arg-type]
    save_model(tmp_path, denoiser.options, denoiser.state_dict(), {"data": "\x1b[31mred\nlicence  free"})
    assert "trained on  \\x1b[31mred licence free\n" in describe_path(tmp_path)


def test_damaged_settings_of_a_run(tmp_path: Path) -> None:
    content = {"run_id": "x", "identity": {}, "settings": []}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config.json is damaged \(settings is not a dict\)"):
        describe_path(tmp_path)


def test_model_with_an_image_condition(tmp_path: Path) -> None:
    denoiser = build_denoiser(8, 1, cond_channels=3, **OPTIONS)  # type: ignore[arg-type]
    text = describe_path(save_model(tmp_path, denoiser.options, denoiser.state_dict()))
    assert "Gflops" in text


def test_run_under_way_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = dataclasses.replace(digits().network, **OPTIONS)  # type: ignore[arg-type]
    config = dataclasses.replace(
        digits(), num_images=64, batch_size=16, log_images=16, snapshot_images=16, network=network
    )
    step = Trainer.step

    def stop_halfway(self: Trainer, **options: bool) -> None:
        step(self, **options)
        if self.num_images == 32:
            self.request_stop()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_halfway)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", preset="digits", quiet=True)
    text = describe_path(tmp_path / "run")
    assert f"run         {tmp_path / 'run'}, preset digits" in text
    assert "progress    32 of 64 images, loss " in text
    assert "snapshots   2 times, EMA lengths 0.05, 0.1" in text
    assert "model       none yet: the run has not ended" in text
    train(config, tmp_path / "run", preset="digits", quiet=True)
    text = describe_path(tmp_path / "run")
    assert "progress    64 of 64 images" in text
    assert "images      1 x 8 x 8, 10 classes" in text


def test_settings_with_their_models(tmp_path: Path) -> None:
    denoiser = build_denoiser(8, 1, **OPTIONS)  # type: ignore[arg-type]
    for name in ("a", "b"):
        save_model(tmp_path / f"{name}.safetensors", denoiser.options, denoiser.state_dict())
    settings = tmp_path / "edm2-img64-s-autog-fid.json"
    content = {"format": "edm2.sampling/1", "preset": "x", "model": "a.safetensors", "guide": "b.safetensors"}
    content |= {"guidance": 1.7, "reported": {"metric": "FID", "value": 1.01}}
    settings.write_text(json.dumps(content))
    for path in (settings, tmp_path):
        lines = describe_path(path).splitlines()
        assert lines[0] == f"settings    {path}, heun, 32 steps"
        assert lines[1] == f"guide       {tmp_path / 'b.safetensors'}, weight 1.7 for sigma in (0, inf]"
        assert lines[2] == "result      FID 1.01"
        assert lines[3].startswith(f"model       {tmp_path / 'a.safetensors'}, 0.")


def test_a_shared_folder(tmp_path: Path) -> None:
    denoiser = build_denoiser(8, 1, **OPTIONS)  # type: ignore[arg-type]
    coding = {"kind": "pixels", "num_channels": 1, "mean": [0.0], "std": [0.5], "sigma_data": 0.5}
    save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict(), {"coding": coding})
    folder = save_pretrained(tmp_path / "m.safetensors", tmp_path / "shared")
    assert describe_path(folder).startswith(f"settings    {folder}, dpmpp-3m, 24 steps\nmodel       {folder}")


def test_the_name_of_a_published_setting() -> None:
    text = describe_released("edm2-img64-s-autog-fid")
    assert "published with FID 1.01\nnetwork     edm2-img64-s-1073741-0.045.pkl\n" in text
    assert "guide       edm2-img64-xs-0134217-0.110.pkl, weight 1.7\nnext        edm2 import" in text
    assert "guide       none" in describe_released("edm2-img64-s-fid")


def test_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        describe_path(tmp_path)
