import json

import pytest

from edm2.cli import main


def test_two_rungs_from_the_command_line(tmp_path, capsys):
    words = "--images 64 --seeds 0 --configs F G --rate-factors 1 --sigma-rels 0.05 0.1 --search-samples 16"
    words += " --final-samples 16 --num-steps 2 --sampler dpmpp-2m"
    main(["ladder", *words.split(), "--out", str(tmp_path / "ladder")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        "config",
        "---",
        "F",
        "G",
    ]
    kept = json.loads((tmp_path / "ladder" / "ladder.json").read_text())["settings"]
    assert kept["plan"]["sampler"] == "dpmpp-2m"
    assert lines[-1] == str(tmp_path / "ladder" / "report.html")


@pytest.mark.slow
def test_noise_levels_are_those_of_b_to_g(tmp_path):
    words = "--images 32 --seeds 0 --configs A G --rate-factors 1 --sigma-rels 0.1 --search-samples 4"
    words += " --final-samples 4 --num-steps 1 --p-mean -0.9 --p-std 1.5"
    main(["ladder", *words.split(), "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "ladder.json").read_text())["settings"]["training"]["loss"]
    assert (kept["p_mean"], kept["p_std"]) == (-0.9, 1.5)
    trained = {
        c: json.loads((tmp_path / c / "seed-0" / "config.json").read_text())["identity"]["loss"] for c in "AG"
    }
    assert {c: (loss["p_mean"], loss["p_std"]) for c, loss in trained.items()} == {
        "A": (-1.2, 1.2),
        "G": (-0.9, 1.5),
    }


@pytest.mark.slow
def test_one_dropout_for_all(tmp_path):
    words = "--images 32 --seeds 0 --configs F G --rate-factors 1 --sigma-rels 0.1 --search-samples 4"
    words += " --final-samples 4 --num-steps 1 --dropout 0.05"
    main(["ladder", *words.split(), "--out", str(tmp_path)])
    runs = [json.loads((tmp_path / c / "seed-0" / "config.json").read_text())["identity"] for c in "FG"]
    assert [run["network"]["dropout"] for run in runs] == [0.05, 0.05]


@pytest.mark.parametrize("words", ["--p-std 0", "--p-mean nan", "--dropout 1"])
def test_settings_that_cannot_be(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(["ladder", *words.split(), "--out", str(tmp_path / "ladder")])
    assert stop.value.code == 2
    assert "must be " in capsys.readouterr().err
    assert not (tmp_path / "ladder").exists()


def test_unknown_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ladder", "--configs", "Q", "--out", str(tmp_path / "ladder")])
    assert stop.value.code == 2
    assert "config 'Q' is not one of" in capsys.readouterr().err
