"""From a folder of pictures to a run without a preset, and back to the run from its folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edm2.advice.choose as choosing
from edm2.advice import SUGGESTED
from edm2.cli import main
from edm2.generate.archive import SETTINGS_FILE
from edm2.generate.own_guide import OwnGuide
from edm2.presets import get_preset
from edm2.train import TrainConfig, train
from edm2.train.run_folder import claim, read_config
from edm2.train.settings_file import read_settings
from edm2.tuning import TuningPlan

RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a few steps of the smallest network, whatever the speed of this machine."""
    monkeypatch.setattr(choosing.scaling, "SHAPES", ((16, 1),))
    monkeypatch.setattr(choosing, "_PROBE", (16, 1))
    monkeypatch.setattr(choosing, "_MEASURED_STEPS", 1)
    monkeypatch.setattr(OwnGuide.save_grid, "__kwdefaults__", {"num_images": 4, "num_steps": 2})


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_two_commands_from_pictures_to_samples(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "photos"
    main(["train", "--data", str(photos), "--out", str(run), "--hours", "1e-5", "--device", "cpu"])
    told = capsys.readouterr()
    assert "settings for" in told.out
    assert "--network.model-channels 16" in told.out
    assert "measured here; each image is seen" in told.out
    assert "images are few" in told.out
    with Image.open(run / "samples.png") as grid:
        assert grid.width > 128
    first = f"next: edm2 sample {run} --ema 0.1 --guide-ema 0.1 --guide-images 32 --guidance 1.75 --out {run}/samples"
    assert told.err.splitlines()[-2:] == [first, f"next: edm2 tune {run}"]
    settings = read_config(run)["settings"]
    assert (settings["preset"], settings["num_images"], settings["snapshot_images"]) == (SUGGESTED, 80, 8)

    # The run continues with what it stores, without measuring again.
    model = (run / "model.safetensors").read_bytes()
    main(["train", "--out", str(run)])
    assert "settings for" not in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == model
    main(["train", "--data", str(photos), "--out", str(run), "--images", "96"])
    assert read_config(run)["settings"]["num_images"] == 96
    assert "--hours 1 has no effect" in fails(["train", "--out", str(run), "--hours", "1"], capsys)

    main([*first.split()[2:], "--label", "dog", "--num-steps", "2", "--seeds", "0-3"])
    assert capsys.readouterr().err.splitlines()[-1] == f"next: edm2 report {run}"
    told_class = json.loads((run / "samples" / SETTINGS_FILE).read_text())["labels"]
    assert told_class == {"class": 1}
    words = ["sample", str(run), "--out", str(tmp_path / "x"), "--label"]
    assert "there is no class 'dogs': did you mean dog?" in fails([*words, "dogs"], capsys)
    assert "there is no class '2': there are cat, dog" in fails([*words, "2"], capsys)


def test_what_is_refused_before_anything_is_measured(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "dry_run", None)
    out = str(tmp_path / "run")
    assert "no training data: give --data" in fails(["train", "--out", out], capsys)
    assert "hours 0.0 must be above 0" in fails(
        ["train", "--data", str(photos), "--out", out, "--hours", "0"], capsys
    )
    Image.new("RGBA", (9, 9)).save(photos / "cat" / "clear.png")
    told = fails(["train", "--data", str(photos), "--out", out], capsys)
    assert "transparency in 1 of 25 pictures" in told
    assert f"edm2 data convert {photos} --out photos-8.zip --size 8 --background white" in told
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "measured by one process" in fails(["train", "--data", str(photos), "--out", out], capsys)
    assert not (tmp_path / "run").exists()


def test_suggest_writes_what_train_takes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("toml", "json"):
        out = tmp_path / f"photos.{suffix}"
        words = ["suggest", str(photos), "--hours", "1e-5", "--device", "cpu", "--out", str(out)]
        main(words)
        assert capsys.readouterr().err.endswith(f"next: edm2 train --settings {out} --out runs/photos\n")
        if suffix == "json":
            assert read_settings(out).values["num_images"] == 80
        assert f"{out} exists already" in fails(words, capsys)
    assert "must end in .toml or .json" in fails(["suggest", str(photos), "--out", "x.txt"], capsys)


def test_settings_as_json_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--preset", "digits", "--out", "none", "--print-settings"])
    path = tmp_path / "digits.json"
    path.write_text(capsys.readouterr().out)
    assert read_settings(path).values["batch_size"] == 32


def test_weights_to_start_from_need_no_rampup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rampup(*words: str) -> float:
        main(["train", "--preset", "digits", "--print-settings", "--out", str(tmp_path / "run"), *words])
        found: float = json.loads(capsys.readouterr().out)["optimizer"]["rampup_mimg"]
        return found

    assert rampup() == 0.002
    assert rampup("--init", "x") == 0
    assert rampup("--init", "x", "--optimizer.rampup-mimg", "0.01") == 0.01
    # A run that began with a ramp-up continues by the same command.
    config = dataclasses.replace(get_preset("digits"), init="x", num_images=64)
    claim(tmp_path / "run", config.to_json(), {}, "id")
    assert rampup("--init", "x") == 0.002


def test_info_and_convert_name_the_next_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "info", str(photos)])
    assert capsys.readouterr().err.endswith(f"next: edm2 train --data {photos} --out runs/photos\n")
    Image.new("RGBA", (12, 9)).save(photos / "cat" / "clear.png")
    main(["data", "info", str(photos)])
    assert f"next: edm2 data convert {photos} --out photos-8.zip" in capsys.readouterr().err
    out = tmp_path / "small.zip"
    words = ["data", "convert", str(photos), "--out", str(out), "--size", "8", "--workers", "1"]
    main([*words, "--background", "#f00"])
    assert capsys.readouterr().err.endswith(f"next: edm2 train --data {out} --out runs/small\n")


def test_sampling_starts_at_the_noise_level_that_the_run_stores(
    tmp_path: Path, tiny_digits: Callable[..., TrainConfig]
) -> None:
    run = tmp_path / "run"
    train(tiny_digits(num_images=16, sigma_max=200.0), run, quiet=True)
    options = ["--seeds", "0-2", "--num-steps", "3", "--sampler", "heun", "--grid", "0"]
    for name, more in {"plain": [], "told": ["--sigma-max", "200"], "ema": ["--ema", "0.1"]}.items():
        main(["sample", str(run), *options, *more, "--out", str(tmp_path / f"{name}.npz")])
    made: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    for name in ("plain", "told", "ema"):
        with np.load(tmp_path / f"{name}.npz") as archive:
            made[name] = archive["arr_0"], json.loads(archive["samples.json"])
    assert np.array_equal(made["plain"][0], made["told"][0])
    assert all(record["sampler"]["sigma_max"] == 200 for _, record in made.values())
    assert TuningPlan.for_run(run).range == {"sigma_max": 200.0}
    with pytest.raises(ValueError, match=r"sigma_max 0 must be above 0.002 and finite: change --sigma-max"):
        TrainConfig(sigma_max=0)
    assert "sigma_max" not in TrainConfig().identity()
