"""The forecast demo at a size of seconds, and in earnest."""

import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from edm2.cli import main
from edm2.forecast import read_forecast
from edm2.forecast.demo import ForecastDemo, MeasuredForecast, run_forecast_demo

TINY = ForecastDemo(
    num_images=256, pairs=64, held_out=64, cases=4, members=2, steps=2, tuning_images=16
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MeasuredForecast]:
    out = tmp_path_factory.mktemp("demo") / "a demo"
    return out, run_forecast_demo(out, size=TINY, quiet=True)


@pytest.mark.slow
def test_writes_what_it_measured(done: tuple[Path, MeasuredForecast]) -> None:
    out, measured = done
    assert json.loads((out / "measured.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(measured))
    )
    made = read_forecast(out / "forecast.npz")
    assert made.members.shape == (4, 2, 2, 1, 16, 16)
    with np.load(out / "films.npz") as films:
        np.testing.assert_array_equal(made.truth, films["frames"][:, 2:])
    page = (out / "report.html").read_text()
    for heading in ("Forecast", "Scores", "Training", "The same on the command line"):
        assert f">{heading}</h2>" in page
    assert "CRPS above the exact law" in page


@pytest.mark.slow
def test_continues(done: tuple[Path, MeasuredForecast], tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "demo")
    before = (tmp_path / "demo" / "forecast.npz").read_bytes()
    (tmp_path / "demo" / "forecast.npz").unlink()
    again = run_forecast_demo(tmp_path / "demo", size=TINY, quiet=True)
    assert again.crps == done[1].crps
    assert (tmp_path / "demo" / "forecast.npz").read_bytes() == before


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is not empty and does not hold this demo: choose another --out"):
        run_forecast_demo(tmp_path, size=TINY, quiet=True)


@pytest.mark.slow
def test_the_commands_on_the_page_make_the_same_forecast(
    done: tuple[Path, MeasuredForecast], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = done
    page = html.unescape((out / "report.html").read_text())
    commands = [line for line in re.sub("<[^>]*>", "\n", page).splitlines() if line.startswith("edm2 ")]
    assert [command.split()[1] for command in commands] == ["train", "tune", "forecast"]
    for command in (commands[0], commands[2]):
        main(shlex.split(command)[1:])
    ours, theirs = (read_forecast(out / name) for name in ("forecast.npz", "forecast-by-hand.npz"))
    np.testing.assert_array_equal(ours.members, theirs.members)


@pytest.mark.slow
def test_a_minute_of_training_beats_persistence(tmp_path: Path) -> None:
    size = ForecastDemo(
        num_images=6_000, pairs=2048, held_out=64, cases=24, members=8, steps=2, tuning_images=128
    )
    measured = run_forecast_demo(tmp_path / "demo", size=size, quiet=True)
    assert max(measured.ratio) < 1.3
    assert min(measured.below_persistence) > 0.3
