"""The main job at a size of seconds: what it writes, what it says, what continues it and what it refuses."""

import dataclasses
import html
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edm2.cli import main
from edm2.data import open_dataset
from edm2.demo import SWEEP, Measured, run_demo
from edm2.diffusion import read_model_header
from edm2.generate import read_images
from edm2.metrics import label_agreement
from edm2.presets import digits
from edm2.train import Stopped, TrainConfig
from edm2.train.loop import Trainer

COUNT = 24


def tiny(**changes: Any) -> TrainConfig:
    config = digits()
    network = dataclasses.replace(
        config.network, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
    )  # fmt: skip
    settings: dict[str, Any] = dict(
        num_images=128,
        batch_size=16,
        log_images=32,
        snapshot_images=16,
        checkpoint_images=64,
        network=network,
    )
    return dataclasses.replace(config, **{**settings, **changes})


@pytest.fixture(autouse=True, scope="module")
def _short_sweep() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edm2.demo._SWEEP_IMAGES", 40)
        patch.setattr("edm2.demo._SWEEP_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measured]:
    out = tmp_path_factory.mktemp("demos") / "a demo"
    return out, run_demo(out, config=tiny(), num_images=COUNT, quiet=True)


def test_writes_what_it_measured(done: tuple[Path, Measured]) -> None:
    out, measured = done
    written = json.loads((out / "measured.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(measured)))
    assert measured.sigma_rels == SWEEP
    assert measured.scores[SWEEP.index(measured.best)] == min(measured.scores)
    assert all(math.isfinite(value) for value in (*measured.scores, measured.frechet, measured.seconds))
    assert measured.frechet > measured.frechet_real > 0
    assert measured.accuracy_real > 0.97
    assert measured.nearest > 0
    assert 0 <= measured.copies <= 1
    assert 0 <= measured.authentic <= 1
    assert not measured.continued


def test_measures_the_images_that_it_wrote(done: tuple[Path, Measured]) -> None:
    out, measured = done
    real = open_dataset("digits")
    where = np.arange(len(real))
    made = read_images([out / "samples" / f"{seed:06d}.png" for seed in range(COUNT)])
    share = label_agreement(real.images(where), real.labels(where), made, np.arange(COUNT) % 10)
    assert share == measured.agreement


def test_the_model_kept_is_the_best_one(done: tuple[Path, Measured]) -> None:
    out, measured = done
    (model,) = (out / "ema").iterdir()
    info = read_model_header(model)[1]["info"]
    assert info["sigma_rel"] == measured.best
    assert info["num_images"] == 128


def test_report(done: tuple[Path, Measured]) -> None:
    out, measured = done
    page = (out / "report.html").read_text()
    for heading in (
        "Samples",
        "Are they copies?",
        "EMA length, chosen after training",
        "Training",
        "Settings",
    ):
        assert f">{heading}</h2>" in page
    assert f"{100 * measured.agreement:.1f}%" in page
    assert f"{100 * measured.accuracy_real:.1f}%" in page
    assert f"{measured.nearest_real:.4f}" in page
    assert "whole job" in page
    assert page.count("<img") == 2 + 1 + 3  # samples, copies, curves
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("network.model_channels", "optimizer.ref_lr", "ema.sigma_rels", "num_images", "seed"):
        assert f">{name}<" in page
    # The settings are not the preset's, so no command trains with them.
    assert "edm2 train" not in page
    assert f"--seeds 0-{COUNT - 1}" in page


def test_pictures(done: tuple[Path, Measured]) -> None:
    out, _ = done
    for name in ("samples", "real", "ema", "loss", "uncertainty"):
        with Image.open(out / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 20
    with Image.open(out / "samples.png") as made, Image.open(out / "real.png") as real:
        assert made.size[0] == real.size[0]


@pytest.mark.slow
def test_the_presets_commands_make_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edm2.presets.PRESETS", {"digits": tiny})
    out = tmp_path / "it's here"
    measured = run_demo(out, num_images=12)
    shown = capsys.readouterr()
    assert [line[:5] for line in shown.out.splitlines()] == [f"[{i}/5]" for i in range(1, 6)]
    assert "scoring" in shown.err
    page = html.unescape((out / "report.html").read_text())
    commands = [line for line in re.sub("<[^>]*>", "\n", page).splitlines() if line.startswith("edm2 ")]
    assert [command.split()[1] for command in commands] == ["train", "ema", "sample"]
    for command in commands:
        main(shlex.split(command)[1:])
    by_hand = tmp_path / "it's here-by-hand"
    name = f"ema-{measured.best:.4g}.safetensors"
    assert (by_hand / "ema" / name).read_bytes() == (out / "ema" / name).read_bytes()
    for seed in range(12):
        file = f"{seed:06d}.png"
        assert (by_hand / "samples" / file).read_bytes() == (out / "samples" / file).read_bytes()


@pytest.mark.slow
def test_an_interrupted_demo_continues_to_the_same_files(
    done: tuple[Path, Measured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = done
    step = Trainer.step

    def stop_halfway(self: Trainer, **options: Any) -> None:
        step(self, **options)
        if self.num_images == 80:
            self.request_stop()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_halfway)
        with pytest.raises(Stopped, match="stopped at 80 of 128 images"):
            run_demo(tmp_path / "demo", config=tiny(), num_images=COUNT, quiet=True)
    assert not (tmp_path / "demo" / "report.html").exists()
    measured = run_demo(tmp_path / "demo", config=tiny(), num_images=COUNT, quiet=True)
    assert measured.continued
    assert dataclasses.replace(measured, seconds=0, continued=False) == dataclasses.replace(whole, seconds=0)
    assert (tmp_path / "demo" / "samples.png").read_bytes() == (out / "samples.png").read_bytes()
    assert "last session" in (tmp_path / "demo" / "report.html").read_text()


@pytest.mark.slow
def test_samples_that_are_there_are_kept(done: tuple[Path, Measured], tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "demo")
    kept = tmp_path / "demo" / "samples" / "000003.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "demo" / "samples" / "000004.png").unlink()
    measured = run_demo(tmp_path / "demo", config=tiny(), num_images=COUNT, quiet=True)
    assert kept.stat().st_mtime_ns == before
    assert dataclasses.replace(measured, seconds=0, continued=False) == dataclasses.replace(
        done[1], seconds=0
    )


@pytest.mark.slow
def test_a_longer_run_does_not_pass_off_the_old_model(done: tuple[Path, Measured], tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "demo")
    model = next((tmp_path / "demo" / "ema").iterdir())
    for sigma_rel in SWEEP:
        if not (other := model.with_name(f"ema-{sigma_rel:.4g}.safetensors")).exists():
            shutil.copy(model, other)
    with pytest.raises(ValueError, match=r"run had seen 128 images, and now it has seen 160: move .*ema and"):
        run_demo(tmp_path / "demo", config=tiny(num_images=160), num_images=COUNT, quiet=True)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no demo: choose another --out"):
        run_demo(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is a file: give a folder as --out"):
        run_demo(tmp_path / "notes.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run is not empty and holds no run \(notes\.txt\): choose another"):
        run_demo(tmp_path, quiet=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes.txt", "notes.txt", "run"]


@pytest.mark.slow
def test_another_run_is_left_alone(done: tuple[Path, Measured]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done[0].rglob("*")}
    with pytest.raises(ValueError, match=r"holds another run \(seed 0 there, 1 here\)"):
        run_demo(done[0], config=tiny(seed=1), quiet=True)
    assert {path: path.stat().st_mtime_ns for path in done[0].rglob("*")} == before


def test_bad_settings_come_before_work(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(ValueError, match="num_images 1 must be at least 2"):
        run_demo(out, config=tiny(), num_images=1)
    unlabelled = dataclasses.replace(tiny().dataset, labels=False)
    with pytest.raises(
        ValueError, match="digits has no classes, by which the demo judges images: give labels"
    ):
        run_demo(out, config=tiny(dataset=unlabelled))
    assert not out.exists()
