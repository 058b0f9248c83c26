"""`edm2 forecast`, with a tiny network that nobody trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edm2.cli import main
from edm2.data import FloatCoding
from edm2.diffusion import build_denoiser, save_model
from edm2.forecast import read_forecast
from edm2.train.coding import Coding

WORDS = ["--steps", "3", "--members", "2", "--num-steps", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    denoiser = build_denoiser(8, 1, cond_channels=2, model_channels=8, channel_mult=(1,), channels_per_head=8)
    with torch.no_grad():
        denoiser.unet.out_gain.fill_(0.5)
    coding = Coding(
        kind="floats", values=FloatCoding(mean=(0.0,), std=(1.0,), sigma_data=0.5), num_channels=1
    )
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(path, denoiser.options, denoiser.state_dict(), {"coding": coding.to_json()})
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("films") / "films.npz"
    np.savez(path, frames=np.random.default_rng(0).standard_normal((4, 5, 1, 8, 8)).astype(np.float32))
    return path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_forecast_scores_and_page(
    model: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.npz"
    words = ["forecast", str(model), "--start", str(films), "--out", str(out), *WORDS]
    main(words)
    shown = capsys.readouterr().out
    assert "below persistence" in shown
    assert f"page: {out}.html" in shown
    made = read_forecast(out)
    assert made.members.shape == (4, 2, 3, 1, 8, 8)
    with np.load(films) as given:
        np.testing.assert_array_equal(made.start, given["frames"][:, :2])
        np.testing.assert_array_equal(made.truth, given["frames"][:, 2:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "f.npz.html", "f.npz.scores.json"]
    assert "Rank of the truth" in (tmp_path / "f.npz.html").read_text()
    command = json.loads((tmp_path / "f.npz.scores.json").read_text())["scores"]
    main(["metrics", "ensemble", str(out), "--out", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["scores"] == command
    before = out.read_bytes()
    (tmp_path / "f.npz.html").unlink()
    main(words)  # nothing is left to do but the page
    assert out.read_bytes() == before
    assert (tmp_path / "f.npz.html").exists()


def test_some_cases_other_truth_and_common_noise(model: Path, films: Path, tmp_path: Path) -> None:
    with np.load(films) as given:
        same = np.repeat(given["frames"][:1, :2], 4, axis=0)
    np.savez(tmp_path / "same.npz", start=same)
    np.save(tmp_path / "truth.npy", np.full((4, 3, 1, 8, 8), np.nan))
    words = ["forecast", str(model), "--start", str(tmp_path / "same.npz"), "--no-page", *WORDS]
    for noise in ("independent", "common"):
        main([*words, "--noise", noise, "--out", str(tmp_path / f"{noise}.npz")])
    independent, common = (read_forecast(tmp_path / f"{n}.npz").members for n in ("independent", "common"))
    # From one start, with one noise: one forecast.
    np.testing.assert_array_equal(common[0], common[3])
    assert np.abs(independent[0] - independent[3]).max() > 0.1
    main([*words, "--cases", "3", "--truth", str(tmp_path / "truth.npy"), "--out", str(tmp_path / "one.npz")])
    one = read_forecast(tmp_path / "one.npz")
    np.testing.assert_allclose(one.members[0], independent[3], atol=1e-5)  # a case keeps its noise
    main([*words, "--cases", "2", "--out", str(tmp_path / "two.npz")])
    assert read_forecast(tmp_path / "two.npz").settings["cases"] != one.settings["cases"]
    assert not (tmp_path / "one.npz.scores.json").exists()  # nothing of the truth is known


def test_scores_end_where_the_truth_does(
    model: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(films) as given:
        np.savez(tmp_path / "short.npz", frames=given["frames"][:, :4])
    out = tmp_path / "f.npz"
    main(["forecast", str(model), "--start", str(tmp_path / "short.npz"), *WORDS, "--out", str(out)])
    assert "the truth is known up to step 2 of 3" in capsys.readouterr().out
    scores = json.loads((tmp_path / "f.npz.scores.json").read_text())["scores"]
    assert np.shape(scores["crps"]["value"]) == (2, 1)
    assert "Reliability at step 2" in (tmp_path / "f.npz.html").read_text()


def test_bad_words(model: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f.npz"
    words = ["forecast", model, "--out", out, *WORDS]
    assert "none.npz does not exist: give starts" in fails(capsys, *words, "--start", tmp_path / "none.npz")
    assert "--cases 2-4: " in fails(capsys, *words, "--start", films, "--cases", "2-4")
    assert "needs a guide" in fails(capsys, *words, "--start", films, "--guidance", "2")
    assert "which model?" in fails(capsys, "forecast", "--start", films, "--out", out)
    (tmp_path / "f.npz.scores.json").write_text("{}")
    assert "does not hold scores of an ensemble" in fails(capsys, *words, "--start", films)
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz.scores.json"]


@pytest.mark.slow
def test_torchrun_shares_the_work_to_the_same_bits(model: Path, films: Path, tmp_path: Path) -> None:
    words = ["forecast", str(model), "--from", str(films), "--no-page", *WORDS, "--out"]
    main([*words, str(tmp_path / "one.npz")])
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "edm2",
    ]
    subprocess.run([*run, *words, str(tmp_path / "two.npz")], check=True, timeout=300)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_sample_members(model: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(films) as given:
        frames = given["frames"]
    np.savez(tmp_path / "pairs.npz", conditions=frames[:, :2, 0], images=frames[:, 2])
    out = tmp_path / "e.npz"
    words = ["sample", str(model), "--conditions", str(tmp_path / "pairs.npz"), "--num-steps", "2"]
    main([*words, "--members", "3", "--seed", "1", "--batch", "2", "--out", str(out)])
    assert "fair CRPS" in capsys.readouterr().out
    made = read_forecast(out)
    assert made.members.shape == (4, 3, 1, 1, 8, 8)
    np.testing.assert_array_equal(made.truth, frames[:, 2:3])
    assert (tmp_path / "e.npz.html").exists()
    assert (tmp_path / "e.npz.scores.json").exists()
    # The first step of a forecast with the same seed.
    same = [
        "--start",
        str(films),
        "--steps",
        "1",
        "--seed",
        "1",
        "--members",
        "3",
        "--batch",
        "12",
        "--no-page",
    ]
    main(["forecast", str(model), *same, "--num-steps", "2", "--out", str(tmp_path / "f.npz")])
    np.testing.assert_allclose(read_forecast(tmp_path / "f.npz").members, made.members, atol=1e-5)
    some = [*words, "--members", "3", "--seed", "1", "--cases", "3,1", "--out", str(tmp_path / "some.npz")]
    main(some)
    found = read_forecast(tmp_path / "some.npz")
    np.testing.assert_allclose(found.members, made.members[[3, 1]], atol=1e-5)
    np.testing.assert_array_equal(found.truth, frames[[3, 1], 2:3])


def test_sample_members_refuses(
    model: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "c.npy", np.zeros((4, 2, 8, 8), np.float32))
    np.save(tmp_path / "t.npy", np.zeros((3, 1, 8, 8), np.float32))
    words = ["sample", model, "--members", "2", "--out"]
    assert "give --conditions" in fails(capsys, *words, tmp_path / "e.npz")
    words = ["sample", model, "--conditions", tmp_path / "c.npy", "--out", tmp_path / "e.npz", "--cases"]
    assert "--cases 1 is for ensembles: give --members too, or choose --seeds" in fails(capsys, *words, 1)
    assert "holds 4 cases, numbered from 0" in fails(capsys, *words, "2-4", "--members", "2")
    words = ["sample", model, "--members", "2", "--conditions", tmp_path / "c.npy", "--out"]
    assert "must end in .npz, .nc, .zarr" in fails(capsys, *words, tmp_path / "folder")
    truth = ["--truth", tmp_path / "t.npy"]
    assert "truth of shape [3, 1, 8, 8] must be [4, 1, 8, 8]" in fails(
        capsys, *words, tmp_path / "e.npz", *truth
    )
