import pytest

from edm2.cli import main

TINY = [
    "--preset", "digits", "--batch", "8", "--log-images", "16", "--snapshot-images", "32",
    "--network.model-channels", "8", "--network.channel-mult", "1", "--network.attn-resolutions", "8",
    "--network.num-blocks", "1", "--network.channels-per-head", "8",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    main(["train", *TINY, "--images", "64", "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_report_lies_in_the_run_unless_told_otherwise(run, tmp_path, capsys):
    main(["report", str(run), "--no-samples"])
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    main(["report", str(run), str(run), "--no-samples", "--out", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").read_text().count("<h2") == 4


def test_report_of_an_unfinished_run_says_how_to_continue_it(run, capsys):
    (run / "model.safetensors").unlink()
    main(["report", str(run), "--no-samples"])
    assert f"next: edm2 train --out {run}" in capsys.readouterr().err


def test_report_of_nothing(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert "is not a training run" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path, capsys):
    main(["train", *TINY, "--config", "B", "--dry-run", "--machines", "3", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "{" not in out
    assert "on 3 such machines" in out
    assert not (tmp_path / "run").exists()


def test_samples_and_trackers_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", *TINY, "--images", "64", "--sample-images", "32", "--out", str(out)])
    assert len(list((out / "progress").glob("*.png"))) == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", *TINY, "--log-to", "mlflow", "--out", str(tmp_path / "other")])
    assert stop.value.code == 2
    assert "unknown logger 'mlflow'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
