import dataclasses
import json
import shutil

import pytest

from edm2.presets import get_preset
from edm2.run_report import write_run_report
from edm2.train import train
from edm2.train.config import NetworkConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on digits, in a folder whose name is HTML."""

    config = get_preset("digits")
    network = dataclasses.replace(config.network, model_channels=8, num_blocks=1, channels_per_head=8)
    config = dataclasses.replace(
        config, num_images=64, batch_size=8, log_images=16, snapshot_images=16, network=network
    )
    out = tmp_path_factory.mktemp("runs") / "<b>run"
    train(config, out, quiet=True)
    return out


def test_magnitudes_come_with_the_log(run):
    lines = [json.loads(line) for line in (run / "magnitudes.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["num_images"] for line in lines] == [line["num_images"] for line in log] == [16, 32, 48, 64]
    weights = {n: v for n, v in lines[-1]["weights"].items() if not n.startswith("logvar")}
    assert all(value == pytest.approx(1.0, abs=1e-3) for value in weights.values())
    assert all(value > 0 for value in lines[-1]["updates"].values())


def test_recording_changes_nothing(run, tmp_path):

    settings = json.loads((run / "config.json").read_text())["settings"]
    network = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["network"].items()}
    config = dataclasses.replace(
        get_preset("digits"),
        **{name: settings[name] for name in ("num_images", "batch_size", "log_images", "snapshot_images")},
        network=NetworkConfig(**network),
        record_magnitudes=False,
    )
    model = train(config, tmp_path / "off", quiet=True)
    assert model.read_bytes() == (run / "model.safetensors").read_bytes()
    assert not (tmp_path / "off" / "magnitudes.jsonl").exists()


def test_page_of_one_run(run, tmp_path):
    page = write_run_report([run], tmp_path / "report.html", quiet=True).read_text()
    for heading in ("Training", "Magnitudes", "Error by noise level", "Samples over time", "Settings"):
        assert f">{heading}</h2>" in page
    assert "64 of 64" in page
    assert "&lt;b&gt;run" in page
    assert "<b>run" not in page
    assert page.count("<img") == 2 + 4 + 1 + 1


def test_two_runs_side_by_side_without_samples(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "magnitudes.jsonl").unlink()
    page = write_run_report([run, other], tmp_path / "report.html", samples=False, quiet=True).read_text()
    assert "train with --record-magnitudes" in page
    assert "Samples over time" not in page
    assert page.count("<img") == 2 * 2 + 4


def test_a_run_without_its_data_or_snapshots(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "gone")
    (other / "config.json").write_text(json.dumps(config))
    page = write_run_report([other], tmp_path / "report.html", quiet=True).read_text()
    assert "The training data cannot be opened any more" in page
    shutil.rmtree(other / "snapshots")
    page = write_run_report([other], tmp_path / "report.html", quiet=True).read_text()
    assert page.count("No snapshot yet.") == 2


def test_bad_input_writes_nothing(run, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match="no run was given"):
        write_run_report([], out)
    with pytest.raises(ValueError, match="holds no training run"):
        write_run_report([run, tmp_path], out)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no line in its log yet"):
        write_run_report([other], out)
    assert not out.exists()
