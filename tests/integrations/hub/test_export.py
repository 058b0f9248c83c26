"""Exported networks make the same images, in processes that cannot import edm2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import INFO, small_denoiser

from edm2.cli import main
from edm2.data import FloatCoding
from edm2.diffusion import save_model
from edm2.generate import ImageGenerator
from edm2.hub import Pretrained, Sampling, export
from edm2.hub.export import export_model
from edm2.nn import keyed_normal
from edm2.train.coding import Coding

# Floats, so that differences are not rounded away; the moments show that they are applied.
CODING = Coding(kind="floats", values=FloatCoding(mean=(5.0,), std=(2.0,)), num_channels=1)
BLOCKED = "import runpy, sys; sys.modules.update(dict.fromkeys({!r})); sys.argv = {!r}; "
BLOCKED += "runpy.run_path(sys.argv[0], run_name='__main__')"


def guided_model(**options):
    """A conditional model, which an unconditional one guides in an interval."""
    model, guide = (
        ImageGenerator(small_denoiser(s, **o), CODING, INFO) for s, o in ((0, options), (1, {"label_dim": 0}))
    )
    return Pretrained(model, guide=guide, sampling=Sampling(num_steps=6, guidance=1.5, interval=(0.1, 5.0)))


def run_script(folder: Path, tmp_path: Path, blocked: list[str], *options: object) -> np.ndarray:
    words = [str(folder / "sample.py"), "--out", str(tmp_path / "made.npy"), *map(str, options)]
    subprocess.run([sys.executable, "-c", BLOCKED.format(blocked, words)], check=True, cwd=tmp_path, env={})
    return np.load(tmp_path / "made.npy")


@pytest.mark.slow
@pytest.mark.parametrize(("to", "blocked"), [("pt2", ["edm2"]), ("onnx", ["edm2", "torch"])])
def test_the_script_makes_edm2s_images(to, blocked, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = guided_model(attn_resolutions=(4,))
    done = export_model(model, to, tmp_path / "made")
    assert done.difference < 1e-4
    np.save(tmp_path / "noise.npy", keyed_normal(torch.arange(5), (1, 8, 8)).numpy())
    made = run_script(done.folder, tmp_path, blocked, "--noise", tmp_path / "noise.npy")
    assert np.abs(made - model.images(range(5))).max() < 2 * 1e-4  # std of the data is 2


@pytest.mark.slow
def test_a_student_makes_its_images_in_one_step(tmp_path):
    info = {**INFO, "consistency": {"teacher": "t", "sigma_max": 80.0}}
    model = Pretrained(
        ImageGenerator(small_denoiser(), CODING, info), sampling=Sampling(sampler="consistency", num_steps=1)
    )
    done = export_model(model, "pt2", tmp_path / "made")
    np.save(tmp_path / "noise.npy", keyed_normal(torch.arange(3), (1, 8, 8)).numpy())
    made = run_script(done.folder, tmp_path, ["edm2"], "--noise", tmp_path / "noise.npy")
    assert np.abs(made - model.images(range(3))).max() < 2 * 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", "AE")
def test_other_configurations_can_be_exported(config, tmp_path):
    model = Pretrained(ImageGenerator(small_denoiser(config=config, attn_resolutions=(4,)), CODING, INFO))
    assert export_model(model, "pt2", tmp_path / "made").difference < 1e-4


@pytest.mark.slow
def test_conditions_are_inputs_and_pixels_are_bytes(tmp_path, capsys):
    denoiser = small_denoiser(cond_channels=2)
    file = save_model(tmp_path / "model.safetensors", denoiser.options, denoiser.state_dict(), INFO)
    main(["export", str(file), "--to", "pt2", "--out", str(tmp_path / "made")])
    assert "its images differ from edm2's by" in capsys.readouterr().out
    condition = keyed_normal(torch.arange(3), (2, 8, 8), stream=1)
    noise = keyed_normal(torch.arange(3), (1, 8, 8))
    np.save(tmp_path / "condition.npy", condition.numpy())
    np.save(tmp_path / "noise.npy", noise.numpy())
    given = ("--noise", tmp_path / "noise.npy", "--condition", tmp_path / "condition.npy")
    made = run_script(tmp_path / "made", tmp_path, ["edm2"], *given)
    expected = ImageGenerator.load(file).images(range(3), conditions=condition, sampler="heun")
    assert made.dtype == np.uint8
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert (made == expected).mean() > 0.99


def test_a_folder_is_never_replaced(tmp_path):
    with pytest.raises(
        FileExistsError, match=r"exists already and holds something else: choose another --out"
    ):
        export_model(guided_model(), "pt2", tmp_path)


def test_the_same_export_is_kept(tmp_path):
    pytest.importorskip("diffusers")
    done = export_model(guided_model(), "diffusers", tmp_path / "made")
    assert done.difference < 1e-6
    assert sorted(p.name for p in done.folder.iterdir()) == ["guide", "model", "model.json", "scheduler"]
    assert json.loads((done.folder / "model.json").read_text())["interval"] == [0.1, 5.0]
    written = (done.folder / "model.json").stat().st_mtime_ns
    assert export_model(guided_model(), "diffusers", tmp_path / "made") == done  # as after an interruption
    assert (done.folder / "model.json").stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="holds something else"):
        export_model(guided_model(label_dim=2), "diffusers", done.folder)


def test_a_network_that_differs_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(FloatingPointError, match=r"differ by 0\.0e\+00 sigma_data from edm2's, more than -1"):
        export_model(guided_model(), "diffusers", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
