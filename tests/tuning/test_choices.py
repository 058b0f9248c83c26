"""Guides from elsewhere, and other metrics and features, in a search."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from edm2.cli import main
from edm2.data import open_dataset
from edm2.diffusion import build_denoiser, load_model, save_model
from edm2.evaluation.judge import Judge
from edm2.generate import ImageGenerator
from edm2.hub import open_pretrained
from edm2.hub.results import tuning_results
from edm2.metrics import CallableFeatures, fit_classifier, squared_mmd
from edm2.presets import get_preset
from edm2.train import train
from edm2.tuning import TuningPlan, tune
from edm2.tuning.page import verdict, write_tuning_report
from edm2.tuning.result import Knobs, Tuned, read_tuned, save_tuned

PLAN = TuningPlan(
    sigma_rels=(0.05, 0.1), guide_moments=(0.5,), guide_factors=(1.0,), guidances=(2.0,), highs=(8.0,), lows=(),
    samples=8, final_samples=8, repeats=2, num_steps=4, sampler="dpmpp-2m",
)  # fmt: skip
SEARCH = "--sigma-rels 0.05 0.1 --guide-moments 0.5 --guide-factors 1 --guidances 2 --highs 8 --lows 0.5"
SIZES = "--samples 16 --final-samples 16 --repeats 3 --num-steps 2 --sampler euler"
WORDS = [*SEARCH.split(), *SIZES.split()]


def train_small(out, **dataset):
    config = get_preset("digits")
    network = dataclasses.replace(
        config.network,
        model_channels=8,
        channel_mult=(1,),
        attn_resolutions=(8,),
        num_blocks=1,
        channels_per_head=8,
    )
    dataset = dataclasses.replace(config.dataset, **dataset)
    config = dataclasses.replace(
        config, num_images=320, batch_size=8, snapshot_images=80, network=network, dataset=dataset
    )
    train(config, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("choices") / "run")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A run on the same images without their classes."""
    return train_small(tmp_path_factory.mktemp("choices") / "unconditional", labels=False)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


class Likeness:
    """Mean difference from images that certain settings give for the same seeds: 0 for these settings alone."""

    fingerprint = metric = "likeness"
    features = "pixels"

    def __init__(self, run, sigma_rel, **settings):
        generator, guide = ImageGenerator.load(run, sigma_rel), ImageGenerator.load(*settings.pop("guide"))
        options = dict(guide=guide, num_steps=4, sampler="dpmpp-2m", **settings)
        self.wanted, *self.held_out = (
            generator.images(range(start, start + 8), **options)
            for start in (3_000_000, 4_000_000, 4_000_008)
        )
        self.calls = 0

    def distance(self, images):
        self.calls += 1
        return min(float(np.abs(images.astype(float) - w).mean()) for w in (self.wanted, *self.held_out))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "run"])
def test_an_unconditional_guide_that_helps_is_found_and_sampled_with(
    run, unconditional, tmp_path, kind, capsys
):
    given = unconditional / "model.safetensors" if kind == "file" else unconditional
    length = None if kind == "file" else 0.05
    score = Likeness(run, 0.05, guide=(given, length), guidance=2.0)
    found = tune(run, score, dataclasses.replace(PLAN, guide=given))
    moment = None if kind == "file" else 320
    assert found.best == Knobs(
        sigma_rel=0.05, guide=str(given), guide_images=moment, guide_sigma_rel=length, guidance=2.0
    )
    assert found.is_better
    assert min(t.score for t in found.tried) == 0
    assert any(t.knobs.guide is None and t.knobs.guide_images == 160 for t in found.tried)
    assert f"guide {given}" in found.best.describe()
    save_tuned(run, found)
    assert read_tuned(run) == found
    assert open_pretrained(run).guide.identity() == ImageGenerator.load(given, length).identity()
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    seeds = "3000000-3000007"
    main(["sample", str(moved), "--seeds", seeds, "--out", str(tmp_path / "out.npz"), "--grid", "0"])
    assert f"guide {given}" in capsys.readouterr().err
    with np.load(tmp_path / "out.npz") as content:
        images = next(content[name] for name in content.files if content[name].ndim == 4)
    assert np.array_equal(images.reshape(score.wanted.shape), score.wanted)
    page = write_tuning_report(found, PLAN, tmp_path / "report.html", title="t").read_text()
    assert "Likeness on pixels: lower by" in page


def test_a_guide_is_known_by_what_is_in_it(run, unconditional, tmp_path):
    guide = tmp_path / "guide.safetensors"
    shutil.copy(unconditional / "model.safetensors", guide)
    score = Likeness(run, 0.05, guide=(guide,), guidance=2.0)
    plan = dataclasses.replace(PLAN, guide=guide)
    tune(run, score, plan)
    calls = score.calls
    renamed = guide.rename(tmp_path / "renamed.safetensors")
    tune(run, score, dataclasses.replace(PLAN, guide=renamed))
    assert score.calls == calls
    denoiser, info = load_model(renamed)
    state = {name: tensor * 1.5 for name, tensor in denoiser.state_dict().items()}
    save_model(renamed, denoiser.options, state, info, overwrite=True)
    changed = tune(run, score, dataclasses.replace(PLAN, guide=renamed))
    assert score.calls > calls
    assert all(t.score > 0 for t in changed.tried)


def test_a_guide_that_is_what_the_search_saved_before(run, unconditional):
    score = Likeness(run, 0.05, guide=(unconditional, 0.05), guidance=2.0)
    first = tune(run, score, dataclasses.replace(PLAN, guide=unconditional))
    kept = save_tuned(run, first) / "guide.safetensors"
    content = kept.read_bytes()
    again = tune(run, score, dataclasses.replace(PLAN, guide=kept))
    assert again.best.guide == str(kept)
    save_tuned(run, again)
    assert kept.read_bytes() == content


def test_a_guide_that_does_not_fit_is_refused_before_work_starts(
    run, unconditional, tmp_path, monkeypatch, capsys
):
    denoiser, info = load_model(unconditional)
    other = {**info, "coding": {**info["coding"], "mean": [0.5]}}
    save_model(tmp_path / "coded.safetensors", denoiser.options, denoiser.state_dict(), other)
    wide = build_denoiser(**{**denoiser.options, "img_resolution": 16, "attn_resolutions": ()})
    save_model(tmp_path / "wide.safetensors", wide.options, wide.state_dict(), info)
    for name, told in (
        ("coded", "the guide's images are coded as"),
        ("wide", r"the guide has images \(1, 16, 16\), the model \(1, 8, 8\)"),
        ("missing", "missing.safetensors"),
    ):
        plan = dataclasses.replace(PLAN, guide=tmp_path / f"{name}.safetensors")
        with pytest.raises((ValueError, OSError), match=told):
            tune(run, None, plan)
    monkeypatch.setattr("edm2.commands.tune._judge", lambda _: pytest.fail("worked"))
    with pytest.raises(SystemExit):
        main(["tune", str(run), "--guide", str(tmp_path / "wide.safetensors"), *WORDS])
    assert "the guide has images (1, 16, 16), the model (1, 8, 8)" in capsys.readouterr().err
    assert not (run / "tuning").exists()


def test_a_file_of_settings_from_before_there_were_such_guides(run):
    tuned = Tuned(
        best=Knobs(sigma_rel=0.1, guide_images=160.0, guide_sigma_rel=0.1, guidance=1.5),
        num_steps=4, sampler="heun", tried=[], held_out=[1.0, 2.0], baseline=[2.0, 4.0],
    )  # fmt: skip
    path = save_tuned(run, tuned) / "tuned.json"
    content = json.loads(path.read_text())
    for name in ("metric", "features", "is_share", "is_better", "num_images", "sha256"):
        del content[name]
    del content["knobs"]["guide"]
    path.write_text(json.dumps(content))
    assert read_tuned(run) == tuned


def pixels(images):
    return images.flatten(1).double() / 255


FEATURES = CallableFeatures(pixels, name="pixels", num_features=64)


@pytest.mark.slow
def test_features_that_are_a_function_and_metrics_that_are_not_mixed(run):
    dataset = open_dataset("digits")
    kernel, frechet = (Judge(dataset, metric=m, extractor=FEATURES) for m in ("kernel", "frechet"))
    by_kernel, by_frechet = tune(run, kernel, PLAN), tune(run, frechet, PLAN)
    images = ImageGenerator.load(run, 0.1).images(
        range(4_000_000, 4_000_008), num_steps=4, sampler="dpmpp-2m"
    )
    real = pixels(torch.from_numpy(dataset.images(np.arange(len(dataset)))))
    assert by_kernel.baseline[0] == pytest.approx(
        squared_mmd(pixels(torch.from_numpy(images)).numpy(), real.numpy()), rel=1e-4
    )
    assert by_frechet.baseline[0] == pytest.approx(frechet.distance(images))
    assert by_frechet.baseline[0] != pytest.approx(by_kernel.baseline[0], rel=0.1)
    assert (by_kernel.metric, by_kernel.features) == ("kernel distance", "pixels")
    usual = Judge(dataset)
    fingerprints = {kernel.fingerprint, frechet.fingerprint, usual.fingerprint}
    renamed = CallableFeatures(pixels, name="other", num_features=64)
    fingerprints.add(Judge(dataset, metric="kernel", extractor=renamed).fingerprint)
    assert len(fingerprints) == 4
    assert usual.fingerprint == f"Frechet distance, classifier of {dataset.fingerprint}"
    with pytest.raises(ValueError, match="metric 'fid' must be frechet or kernel"):
        Judge(dataset, metric="fid")


@pytest.mark.slow
def test_kernel_metric_from_the_command_line(run, capsys):
    main(["tune", str(run), "--metric", "kernel", *WORDS])
    out = capsys.readouterr().out
    assert out.startswith("kernel distance in features of a classifier trained on the run's own images")
    assert "kernel distance with held-out seeds" in out
    assert "Frechet" not in out
    page = (run / "tuning" / "report.html").read_text()
    assert "Kernel distance in features of a classifier" in page
    assert "Frechet" not in page
    found = read_tuned(run)
    assert found.metric == "kernel distance"
    assert tuning_results(found)[0].metric == "kernel distance"


@pytest.mark.slow
def test_a_run_without_classes_is_tuned_in_other_features(unconditional, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tune", str(unconditional), *WORDS])
    assert (
        "these images have no classes to train a classifier on: choose other features, --features inception or dinov2"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["tune", str(unconditional), "--features", "inception", *WORDS])
    assert "inception needs its weights: get the TorchScript file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", str(unconditional), "--weights-sha256", "0" * 64, *WORDS])
    assert "are about --weights: give them too" in capsys.readouterr().err
    assert not (unconditional / "tuning").exists()
    digits = open_dataset("digits")
    rows = np.arange(200)
    fitted = fit_classifier(digits.images(rows), digits.labels(rows), num_classes=10)
    fitted.save(tmp_path / "classifier.safetensors")
    main(["tune", str(unconditional), "--weights", str(tmp_path / "classifier.safetensors"), *WORDS])
    assert read_tuned(unconditional).features == "classifier"


def test_improvement_over_what_may_be_zero_is_a_difference():
    near = Tuned(
        best=Knobs(sigma_rel=0.1), num_steps=4, sampler="heun", tried=[], metric="kernel distance",
        held_out=[-0.001, 0.001, 0.0], baseline=[0.001, 0.004, 0.0005],
    )  # fmt: skip
    assert not near.is_share
    assert near.improvements == pytest.approx([0.002, 0.003, 0.0005])
    assert not near.is_better
    assert verdict(near) == (
        "nothing better than EMA 0.1, no guidance was found; change of -0.00183 (95% confidence -0.00496 to "
        "+0.00129; repeats -0.002 -0.003 -0.0005)"
    )
    clear = dataclasses.replace(near, baseline=[0.1, 0.11, 0.09])
    assert clear.is_share
    assert verdict(clear).startswith("lower by 100.0% (95% confidence ")
    assert not dataclasses.replace(clear, baseline=[0.1], held_out=[0.05]).is_share
    assert not dataclasses.replace(clear, baseline=[0.1, -0.11, 0.09]).is_share
    frechet = dataclasses.replace(clear, metric="Frechet distance", baseline=[0.1], held_out=[0.05])
    assert not frechet.is_better
    assert verdict(frechet) == "change of -50.0% in one repeat, which has no confidence interval"
    assert not dataclasses.replace(frechet, baseline=[0.0]).is_share
