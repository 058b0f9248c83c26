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


def test_unknown_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ladder", "--configs", "Q", "--out", str(tmp_path / "ladder")])
    assert stop.value.code == 2
    assert "config 'Q' is not one of" in capsys.readouterr().err
