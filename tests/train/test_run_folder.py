"""A run's folder takes only what belongs to the run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import files_of, tiny_config, tiny_data, tiny_network

from edm2.train import OptimizerConfig, Trainer, train
from edm2.train.build import open_training_data, pick_device
from edm2.train.logs import append_log, read_log
from edm2.train.run_folder import claim, hold, read_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "finished"
    train(tiny_config(num_images=16), out, dataset=tiny_data(), quiet=True)
    return out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"batch_size": 4}, "batch_size 8 there, 4 here"),
        ({"network": tiny_network(dropout=0.5)}, "network.dropout 0.1 there, 0.5 here"),
        ({"optimizer": OptimizerConfig()}, "optimizer.rampup_mimg 3e-05 there, 10.0 here"),
    ],
)
def test_another_run_is_refused(finished: Path, change: dict[str, Any], told: str) -> None:
    before = files_of(finished)
    with pytest.raises(ValueError, match=f"holds another run .*{told}.*choose another --out"):
        train(tiny_config(num_images=16, **change), finished, dataset=tiny_data(), quiet=True)
    assert files_of(finished) == before


def test_other_images_are_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run \(the images have changed\)"):
        train(tiny_config(num_images=16), finished, dataset=tiny_data(41), quiet=True)


def test_what_does_not_change_the_result_may_change(finished: Path) -> None:
    train(tiny_config(num_images=24, keep_checkpoints=5), finished, dataset=tiny_data(), quiet=True)
    settings = read_config(finished)["settings"]
    assert (settings["num_images"], settings["keep_checkpoints"]) == (24, 5)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a training run: config\.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "r"}'])
def test_damaged_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is damaged .*: restore it from a copy"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        claim(tmp_path, {}, {}, "r")


def test_claim_makes_folders_and_keeps_their_content(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    claim(out, {"x": 1}, {"x": 1}, "r")
    append_log(out, {"num_images": 1})
    claim(out, {"x": 2}, {"x": 1}, "r")
    assert read_config(out) == {"run_id": "r", "identity": {"x": 1}, "settings": {"x": 2}}
    assert read_log(out) == [{"num_images": 1}]


def test_one_process_at_a_time(finished: Path) -> None:
    before = files_of(finished)
    with hold(finished):
        with pytest.raises(
            ValueError, match=r"another process is training into .*: wait until it ends, or choose"
        ):
            train(tiny_config(num_images=48), finished, dataset=tiny_data(), quiet=True)
        with pytest.raises(ValueError, match="another process is training into"):
            hold(finished).__enter__()
    assert files_of(finished) == before


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training data"):
        train(tiny_config(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_kill_while_a_folder_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.json.tmp").write_text("{")
    claim(tmp_path, {}, {}, "r")
    assert read_config(tmp_path)["run_id"] == "r"


def test_checkpoints_without_their_settings_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "000000000040").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is not empty and holds no run \(checkpoints\)"):
        claim(tmp_path, {}, {}, "r")


def test_settings_are_plain_json(finished: Path) -> None:
    content = json.loads((finished / "config.json").read_text())
    assert content["identity"]["network"]["model_channels"] == 8


def test_no_data_named() -> None:
    with pytest.raises(ValueError, match="no training data: give --data with the path"):
        open_training_data(tiny_config())


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "nonsense:1"])
def test_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"device {name!r} cannot be used here .*use auto, cpu, cuda"):
        pick_device(name)


def test_devices_that_are_there() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")


def test_snapshots_lost_before_the_end_are_named(tmp_path: Path) -> None:
    out, config = tmp_path / "run", tiny_config()
    train(dataclasses.replace(config, num_images=80), out, dataset=tiny_data(), quiet=True)
    (lost,) = (out / "snapshots").glob("*80_s0.0500*")
    lost.unlink()
    with (
        pytest.warns(UserWarning, match="1 of 2 snapshot files are missing"),  # at the next snapshot
        pytest.warns(UserWarning, match=f"{lost.name} is .*missing.*; the run continues without them"),
        pytest.raises(
            OSError, match=rf"training is done and .*model.safetensors is written, but .*{lost.name}"
        ),
    ):
        train(config, out, dataset=tiny_data(), quiet=True)
    assert (out / "model.safetensors").exists()


def test_a_folder_of_snapshots_that_vanishes_while_the_run_goes_on(tmp_path: Path) -> None:
    def vanish(trainer: Trainer) -> None:
        if trainer.num_images == 96:
            shutil.rmtree(tmp_path / "snapshots")

    with (
        pytest.warns(UserWarning, match="something deleted or moved them"),
        pytest.raises(OSError, match=r"the snapshot of 80 images with EMA length 0\.05 is missing"),
    ):
        train(tiny_config(), tmp_path, dataset=tiny_data(), quiet=True, on_step=vanish)
