import dataclasses
import html
import json
import shutil
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from edm2.data import ArrayDataset, FloatCoding
from edm2.data.views import rows_like
from edm2.distill import distill, open_teacher, student_settings
from edm2.ema.storage.manifest import read_manifest
from edm2.evaluation.noise_errors import errors_by_noise
from edm2.report import Page
from edm2.run_page import curves, pictures, write_run_report
from edm2.run_page import run as opened_run
from edm2.run_page.run import Run
from edm2.train import train
from edm2.train.coding import Coding
from edm2.train.config_groups import EMAConfig
from edm2.train.with_config import with_config
from edm2.tuning.result import Knobs, Tried, Tuned, save_tuned

HOSTILE = "<b onclick=alert(1)>&amp;$x_$"


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_run):
    """A tiny run on digits, in a folder whose name is HTML."""
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / HOSTILE))


@pytest.fixture
def quick(monkeypatch):
    """Draw figures, but do not encode them, which takes half a second each."""
    monkeypatch.setattr("edm2.report.page.figure_svg", lambda figure: b"<svg/>")


def page_of(runs, tmp_path, **options):
    return write_run_report(runs, tmp_path / "report.html", quiet=True, **options).read_text()


def test_magnitudes_come_with_the_log(run):
    lines = [json.loads(line) for line in (run / "magnitudes.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["num_images"] for line in lines] == [line["num_images"] for line in log] == [16, 32, 48, 64]
    weights = {n: v for n, v in lines[-1]["weights"].items() if not n.startswith("logvar")}
    assert all(value == pytest.approx(1.0, abs=1e-3) for value in weights.values())
    assert all(value > 0 for value in lines[-1]["updates"].values())


def test_recording_changes_nothing(run, tmp_path, tiny_digits):
    model = train(tiny_digits(record_magnitudes=False), tmp_path / "off", quiet=True)
    assert model.read_bytes() == (run / "model.safetensors").read_bytes()
    assert not (tmp_path / "off" / "magnitudes.jsonl").exists()


def test_page_of_one_run(run, tmp_path):
    page = page_of([run], tmp_path)
    for heading in (
        "Training", "Magnitudes", "EMA profiles", "Error by noise level", "Samples over time", "Copies", "Settings"
    ):  # fmt: skip
        assert f">{heading}</h2>" in page
    assert ">Tuning</h2>" not in page
    assert "64 of 64" in page
    assert page.count("<img") == 2 + 1 + 2 + 4 + 2 + 1 + 1
    assert (
        "Generated from seeds 0 to 39, with --ema 0.1 --guide-ema 0.1 --guide-images 32 --guidance 1.75"
        in page
    )
    assert page.index(">Samples</h2>") < page.index(">Training</h2>")


@pytest.mark.usefixtures("quick")
def test_names_are_shown_and_never_obeyed(run, tmp_path, tiny_digits):
    """Of the run, its classes, and the folder and files of its data."""
    data = tmp_path / HOSTILE
    for i, name in enumerate((f"0{HOSTILE}", f"1{HOSTILE}")):
        (data / name).mkdir(parents=True)
        for j in range(4):
            image = np.full((8, 8), 60 * i + j, np.uint8)
            PIL.Image.fromarray(image).save(data / name / f"{j}{HOSTILE}.png")
    named = tmp_path / f"run {HOSTILE}"
    train(tiny_digits(data=str(data), num_images=16), named, quiet=True)
    escaped = html.escape(HOSTILE)
    pages = [page_of([named], tmp_path), page_of([named, run], tmp_path, samples=False)]
    assert f"classes 0{escaped}, 1{escaped}" in pages[0]
    (data / f"0{HOSTILE}" / f"0{HOSTILE}.png").write_bytes(b"cut")
    pages.append(page_of([named], tmp_path))
    for page in pages:
        assert escaped in page
        assert "<b " not in page


@pytest.mark.usefixtures("quick")
def test_two_runs_side_by_side(run, tmp_path):
    other = tmp_path / HOSTILE
    shutil.copytree(run, other)
    page = page_of([run, other], tmp_path, samples=False)
    assert "Samples over time" not in page
    assert page.count("<img") == 2 * (2 + 4 + 2)
    for folder in (run, other):  # of the same name, so told apart by their paths
        assert f"Activations of {html.escape(str(folder))}: RMS of block outputs by resolution, on" in page
    (other / "magnitudes.jsonl").unlink()
    page = page_of([run, other], tmp_path, samples=False)
    assert f"Of {html.escape(str(other))} they were not recorded: train with --record-magnitudes" in page
    assert page.count("<img") == 2 * (2 + 2) + 4


@pytest.mark.usefixtures("quick")
def test_a_run_without_its_data_or_snapshots(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "gone")
    del config["sha256"]
    (other / "config.json").write_text(json.dumps(config))
    assert "The training data can no longer be opened" in page_of([other], tmp_path)
    shutil.rmtree(other / "snapshots")
    assert page_of([other], tmp_path).count("No snapshot yet.") == 5


@pytest.mark.usefixtures("quick")
def test_a_run_that_trains_on_is_shown_as_it_was_at_the_start(run, tmp_path, monkeypatch):
    early, asked = 32, set()

    def first_half(folder):
        manifest = read_manifest(folder)
        return dataclasses.replace(manifest, snapshots=tuple(s for s in manifest.snapshots if s.t <= early))

    def spy(module, name):
        called = getattr(module, name)

        def call(folder, lengths, t=None, **options):
            asked.add(t)
            return called(folder, lengths, t, **options)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(opened_run, "read_manifest", first_half)
    spy(curves, "reconstruct_many")
    spy(opened_run, "generators")
    page_of([run], tmp_path)
    assert max(asked) == early


def test_damaged_settings(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.json").write_text((other / "config.json").read_text().replace('"p_mean"', '"mean"'))
    with pytest.raises(ValueError, match=r"config.json is damaged \(its checksum differs"):
        page_of([other], tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.usefixtures("quick")
def test_a_damaged_line_of_a_log_is_left_out(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "log.jsonl"
    path.write_text(path.read_text().replace("loss", "lass", 1))
    with pytest.warns(UserWarning, match="line 1 is damaged and left out"):
        assert "Training" in page_of([other], tmp_path)


@pytest.mark.usefixtures("quick")
def test_lengths_that_the_snapshots_cannot_give_are_said_to_be_so(tmp_path, tiny_digits):
    train(tiny_digits(snapshot_images=64, ema=EMAConfig(sigma_rels=(0.05,))), tmp_path / "run", quiet=True)
    page = page_of([tmp_path / "run"], tmp_path, samples=False)
    assert page.count("a single snapshot, of sigma_rel 0.05, cannot give") == 3
    assert "Averages reconstructed from all snapshots" in page


@pytest.mark.usefixtures("quick")
def test_config_a_has_a_loss_by_noise_level_and_no_uncertainty(tmp_path, tiny_digits):
    train(with_config(tiny_digits(), "A"), tmp_path / "run", quiet=True)
    page = page_of([tmp_path / "run"], tmp_path)
    assert "Weighted squared error (natural logarithm) at each noise level, on 256 training images<" in page
    assert "Training loss and learning rate<" in page


@pytest.mark.usefixtures("quick")
def test_models_that_need_more_than_a_seed_have_no_samples(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("this model is conditioned on vectors")

    monkeypatch.setattr("edm2.generate.ImageGenerator.images", refuse)
    assert "Not drawn: this model is conditioned on vectors" in page_of([run], tmp_path)


def test_errors_by_noise_of_a_denoiser_that_answers_zero():
    class Zero:
        sigma_data = 0.5

        def __call__(self, x, sigma, labels):
            return torch.zeros_like(x)

        def given(self, condition):
            return self

        def logvar(self, sigma):
            return torch.zeros_like(sigma)

        def parameters(self):
            yield torch.zeros(1)

    coding = Coding(kind="floats", values=FloatCoding(), num_channels=1)
    generator = types.SimpleNamespace(denoiser=Zero(), coding=coding)
    sigma, learned, errors = errors_by_noise(generator, np.full((3, 1, 2, 2), 2, np.float32), None)
    np.testing.assert_allclose(errors, np.log((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * 4), rtol=1e-5)
    assert not learned.any()


@pytest.mark.usefixtures("quick")
def test_tuning_results_are_drawn(run, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(run, tuned)
    tried = [
        Tried(stage="EMA length", knobs=Knobs(sigma_rel=length), score=score)
        for length, score in ((0.05, 3.25), (0.1, 2.75))
    ]
    settings = dict(num_steps=16, sampler="heun", tried=tried, held_out=[2.5, 3.5], baseline=[4.5, 5.5])
    save_tuned(tuned, Tuned(best=tried[1].knobs, **settings))
    page = page_of([tuned], tmp_path, samples=False)
    for text in ("Best settings: EMA 0.1.", ">3.5000<", ">5.5000<", ">EMA length</figcaption>", ">2.7500<"):
        assert text in page
    both = page_of([tuned, run], tmp_path, samples=False)
    assert "<p>Not tuned.</p>" in both
    path = tuned / "tuning" / "tuned.json"
    content = json.loads(path.read_text())
    content["held_out"][0] = "<b>"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tuned.json is damaged .*: run `edm2 tune` again"):
        page_of([tuned], tmp_path)


@pytest.mark.usefixtures("quick")
def test_samples_are_those_of_the_tuned_settings(run, monkeypatch):
    tuned = dict(ema=0.05, num_steps=3, sampler="heun", guidance=1.5, interval=(0.0, 5.0))
    tuned |= dict(guide_ema=0.1, guide_images=32)
    monkeypatch.setattr(pictures, "tuned_settings", lambda folder: (tuned, []))
    monkeypatch.setattr(pictures, "_ROWS", 1)
    page = Page("x")
    pictures.add_best(page, Run(run))
    assert "Generated from seeds 0 to 9, with the tuned settings" in page.render()
    model, guide = pictures._tuned_models(Run(run), tuned)
    assert (model.info["sigma_rel"], model.info["num_images"]) == (0.05, 64)
    assert (guide.info["sigma_rel"], guide.info["num_images"]) == (0.1, 32)
    del tuned["guidance"]
    assert pictures._tuned_models(Run(run), tuned)[1] is None


def test_real_images_are_of_the_classes_beside_them() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    labelled = ArrayDataset(images, np.arange(12) % 3, num_classes=4)
    rows = rows_like(labelled, [0, 1, 2, 0, 1, 2])
    assert (rows % 3).tolist() == [0, 1, 2, 0, 1, 2]
    assert len(set(rows.tolist())) == 6
    assert rows_like(labelled, [3])[0] in range(12)  # a class without images
    assert len(set(rows_like(ArrayDataset(images), [0, 0, 0]).tolist())) == 3


def test_bad_input_writes_nothing(run, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match="is not a training run"):
        write_run_report([run, tmp_path], out)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no line in its log yet"):
        write_run_report([other], out)
    assert not out.exists()


def test_page_of_a_student_shows_its_teacher_from_the_same_seeds(run, tmp_path, quick):
    settings = student_settings(open_teacher(run), run, num_images=16)
    settings = dataclasses.replace(settings, batch_size=8, log_images=8)
    distill(open_teacher(run), tmp_path / "student", settings, quiet=True)
    page = page_of([tmp_path / "student"], tmp_path)
    assert "Teacher and student" in page
    assert (
        "Top row: the teacher, Heun with 63 evaluations. Below: the student with 4, 2, 1 evaluations" in page
    )
    assert "a student does not estimate the mean" in page
    shutil.rmtree(tmp_path / "student" / "teacher")
    assert "Not drawn: " in page_of([tmp_path / "student"], tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_regression_on_pairs_and_its_held_out_images(tmp_path, tiny_digits):
    rng = np.random.default_rng(0)
    conditions = rng.normal(size=(16, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "pairs.npz", images=conditions + 1, conditions=conditions)
    config = tiny_digits(
        data=str(tmp_path / "pairs.npz"), objective="mean", validation="0.25", num_images=32, log_images=16
    )
    train(config, tmp_path / "run", quiet=True)
    page = write_run_report([tmp_path / "run"], tmp_path / "page.html", quiet=True).read_text()
    assert "Held-out images</h2>" in page
    assert "Not drawn for regressions and residual models" in page
    assert "held-out loss" in page
    assert "objective" in page
