"""Forecasts on the disk, in three formats, and their scores by command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.cli import main
from edm2.forecast import Forecast, read_forecast, write_forecast
from edm2.forecast.cases import read_cases
from edm2.metrics.ensemble import score_ensemble


def forecast(**changes: Any) -> Forecast:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((5, 3, 2, 4, 6)).astype(np.float32)
    truth[0, 0, 0, 0, 0] = np.nan
    given = {
        "members": rng.standard_normal((5, 4, 3, 2, 4, 6)).astype(np.float32),
        "truth": truth,
        "start": rng.standard_normal((5, 2, 2, 4, 6)).astype(np.float32),
        "settings": {"model": {"digest": "x"}, "seed": 3},
    }
    return Forecast(**{**given, **changes})


@pytest.mark.parametrize("ending", [".npz", ".nc", ".zarr"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, ending: str) -> None:
    if ending != ".npz":
        pytest.importorskip("xarray")
        pytest.importorskip("zarr")
    path = tmp_path / f"f{ending}"
    pixels = forecast(members=np.arange(5 * 4 * 3 * 2 * 4 * 6, dtype=np.uint8).reshape(5, 4, 3, 2, 4, 6))
    for made in (forecast(), forecast(truth=None, start=None), pixels):  # each in the place of the one before
        assert write_forecast(path, made) == path
        found = read_forecast(path)
        assert found.settings == made.settings
        for name in ("members", "truth", "start"):
            np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
        stored = np.int16 if made is pixels and ending == ".nc" else made.members.dtype
        assert found.members.dtype == stored
        assert (found.persistence is None) == (made.start is None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_forecasts_are_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_forecast(tmp_path / f"{i}.npz", forecast()) for i in range(2))
    assert one.read_bytes() == two.read_bytes()


def test_netcdf_is_named_for_other_programs(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(write_forecast(tmp_path / "f.nc", forecast())) as content:
        assert content.members.dims == ("case", "member", "lead", "channel", "y", "x")
        assert content.lead.values.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros(3)}, "it holds nothing, but no 'members'"),
        ({"members": np.zeros((2, 3))}, r"members of float64 \[2, 3\] must be numbers \[case, member"),
        ({"members": np.array(["a"] * 64).reshape((2,) * 6)}, "must be numbers"),
    ],
)
def test_what_is_not_a_forecast_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "f.npz"
    with pytest.raises(ValueError, match="does not exist: give what"):
        read_forecast(path)
    np.savez(path, **content)
    with pytest.raises(ValueError, match=f"is not a forecast .*{message}"):
        read_forecast(path)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"f\.tif must end in \.npz, \.nc, \.zarr"):
        write_forecast(tmp_path / "f.tif", forecast())


def test_scores_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = forecast()
    path = write_forecast(tmp_path / "f.npz", made)
    main(["metrics", "ensemble", str(path), "--thresholds", "1.5"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "5 cases, 4 members"
    assert "fair CRPS" in shown[1]
    assert "below persistence" in shown[1]
    assert len(shown) == 2 + 3 * 2 + 1
    written = json.loads((tmp_path / "f.npz.scores.json").read_text())
    assert written["made_by"]["seed"] == 3
    assert made.truth is not None
    want = score_ensemble(made.members, made.truth, start=made.persistence, thresholds=[1.5]).to_json()
    assert written["scores"] == want
    assert written["scores"]["reliability"][0]["threshold"] == [1.5, 1.5]


def test_scores_with_truth_and_climate_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = forecast(truth=None, start=None)
    path = write_forecast(tmp_path / "f.npz", made)
    np.save(tmp_path / "truth.npy", np.zeros((5, 3, 2, 4, 6)))
    np.save(tmp_path / "climate.npy", np.ones((7, 2, 4, 6)))
    files = ["--truth", str(tmp_path / "truth.npy"), "--climate", str(tmp_path / "climate.npy")]
    main(["metrics", "ensemble", str(path), *files, "--out", str(tmp_path / "s.json")])
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert np.array(scores["baselines"]["climatology"]["crps"]["value"]) == pytest.approx(1)
    assert "persistence" not in scores["baselines"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no truth to score against: give it with --truth"),
        (["--truth", "none.npy"], "none.npy cannot be read as a .npy file of numbers"),
        (["--resamples", "0"], "--resamples 0 must be at least 1"),
        (
            ["--out", "mine.json"],
            "mine.json exists and does not hold scores of an ensemble: choose another --out",
        ),
    ],
)
def test_bad_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_forecast(Path("f.npz"), forecast(truth=None))
    Path("mine.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["metrics", "ensemble", "f.npz", *words])
    assert message in capsys.readouterr().err
    assert Path("mine.json").read_text() == "{}"


def test_a_zarr_group_that_would_unpickle_is_not_opened(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    path = write_forecast(tmp_path / "f.zarr", forecast())
    metadata = path / "members" / "zarr.json"
    content = json.loads(metadata.read_text())
    metadata.write_text(
        json.dumps({**content, "codecs": [{"name": "numcodecs.pickle", "configuration": {}}]})
    )
    for read in (read_forecast, lambda where: read_cases(where, frames=1, channels=2)):
        with pytest.raises(ValueError, match=r"members/zarr\.json asks for unpickling, which can run code"):
            read(path)


@pytest.mark.parametrize("read", [read_forecast, lambda path: read_cases(path, frames=1, channels=2)])
def test_damaged_and_forged_zarr_groups_are_refused(tmp_path: Path, read: Any) -> None:
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    path = write_forecast(tmp_path / "f.zarr", forecast())
    chunk = next(p for p in sorted((path / "start" / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"f.zarr cannot be read \("):
        read(path)
    about = path / "start" / "zarr.json"
    content = json.loads(about.read_text())
    content["shape"][0] = 10**12
    about.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"f\.zarr "):
        read(path)


def test_archives_whose_arrays_cannot_be_parsed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, members=np.zeros((2, 2, 1, 1, 2, 2)))
    whole = path.read_bytes()
    for old, new in ((b"members.npy", b"members    "), (b"'shape': (2", b"'shape': ((")):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=r"f\.npz is not a forecast"):
            read_forecast(path)
    npy = tmp_path / "a.npy"
    np.save(npy, np.zeros(3))
    npy.write_bytes(npy.read_bytes().replace(b"'shape': (3", b"'shape': (("))
    for command in (
        ["sample", "run", "--labels", str(npy)],
        ["metrics", "ensemble", str(path), "--truth", str(npy)],
    ):
        with pytest.raises((ValueError, SystemExit)):
            main(command)


def test_settings_of_a_forecast_are_an_object(tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    path = write_forecast(tmp_path / "f.zarr", forecast())
    about = path / "zarr.json"
    content = json.loads(about.read_text())
    content["attributes"]["settings"] = "7"
    about.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not a forecast .its settings must be an object, not int"):
        read_forecast(path)
