"""How the score depends on the EMA length: curves by moment and by group of layers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from edm2.cli import main
from edm2.generate import ImageGenerator
from edm2.train import train
from edm2.tuning.lengths import (
    REST,
    LengthStudy,
    SampleDistance,
    TrainingLoss,
    layer_groups,
    length_score,
    read_lengths,
)

LENGTHS = (0.05, 0.08, 0.1)


class Encoder:
    """A score that reads the weights of one group only, so that all curves can be told beforehand."""

    metric, features, fingerprint, work, count = "norm", "an encoder", "norm of an encoder", "no time", 1

    def __init__(self, broken_after=None):
        self.calls, self.broken_after = 0, broken_after

    def measure(self, generator, count):
        if self.calls == self.broken_after:
            raise KeyboardInterrupt
        self.calls += 1
        state = generator.denoiser.state_dict()
        return sum(float(state[n].double().abs().sum()) for n in layer_groups(generator)["encoder 8x8"])


@pytest.fixture
def run(tmp_path, digits_run):
    return shutil.copytree(digits_run, tmp_path / "run")


def study(run, score):
    return LengthStudy(run, score, sigma_rels=LENGTHS, most_moments=3)


def test_curves_are_those_of_the_averages(run):
    found = study(run, Encoder()).measure(quiet=True)
    assert found.moments == [16, 32, 64]
    for t, curve in zip(found.moments, found.by_moment, strict=True):
        for length, score in curve:
            model = ImageGenerator.load(run, length, num_images=t)
            assert score == pytest.approx(Encoder().measure(model, 1), rel=1e-6)
    last = found.by_moment[-1]
    assert [length for length, _ in last] == list(LENGTHS)
    best = min(last, key=lambda pair: pair[1])
    assert found.best == best[0]
    assert {"encoder 8x8", "encoder 4x4", "decoder 8x8", "decoder 4x4", REST} == set(found.groups)
    for name, curve in zip(found.groups, found.by_group, strict=True):
        wanted = last if name == "encoder 8x8" else [[length, best[1]] for length in LENGTHS]
        assert np.allclose(curve, wanted, rtol=1e-6)
    assert read_lengths(run) == found


def test_a_stopped_study_continues(run):
    broken = Encoder(broken_after=6)
    with pytest.raises(KeyboardInterrupt):
        study(run, broken).measure(quiet=True)
    score = Encoder()
    found = study(run, score).measure(quiet=True)
    assert score.calls == study(run, score).num_models - 6
    again = Encoder()
    assert study(run, again).measure(quiet=True) == found
    assert again.calls == 0


def test_the_score_that_suits_a_run(run, tmp_path, tiny_digits):
    distance, model = length_score(run, 8), ImageGenerator.load(run, 0.1)
    assert isinstance(distance, SampleDistance)
    assert distance.work == "8 images in 16 steps of dpmpp-2m"
    assert distance.measure(model, 8) == distance.measure(model, 8) > 0
    settings = tiny_digits(num_images=16)
    blind = dataclasses.replace(settings, dataset=dataclasses.replace(settings.dataset, labels=False))
    train(blind, tmp_path / "blind", quiet=True)
    score = length_score(tmp_path / "blind", 8)
    assert isinstance(score, TrainingLoss)
    model = ImageGenerator.load(tmp_path / "blind", 0.1)
    loss = score.measure(model, 8)
    assert loss == score.measure(model, 8)
    model.denoiser.unet.out_gain.data.fill_(5.0)
    assert score.measure(model, 8) > loss
    mean = dataclasses.replace(settings, objective="mean")
    train(mean, tmp_path / "mean", quiet=True)
    with pytest.raises(ValueError, match="is a regression"):
        length_score(tmp_path / "mean", 8)


def test_lengths_must_be_given_by_the_snapshots(run):
    with pytest.raises(ValueError, match=r"sigma_rel 0.9"):
        LengthStudy(run, Encoder(), sigma_rels=(0.9,))


def test_the_command_tells_the_cost_and_the_page_shows_the_curves(run, capsys, monkeypatch):
    monkeypatch.setattr("edm2.commands.report.length_score", lambda run, count: Encoder())
    main(["report", str(run), "--lengths", "--no-samples"])
    told = capsys.readouterr().err
    assert "averages, for each no time: about" in told
    page = (run / "report.html").read_text()
    assert ">EMA length</h2>" in page
    assert "everywhere but in one group of layers" in page
    main(["report", str(run), "--no-samples"])
    assert ">EMA length</h2>" in (run / "report.html").read_text()


@pytest.mark.parametrize("change", [{"moments": [1.0]}, {"by_moment": [[[0.1]]]}, {"best": "x"}, {"more": 1}])
def test_damaged_file(run, change):
    study(run, Encoder()).measure(quiet=True)
    path = run / "tuning" / "lengths.json"
    content = json.loads(path.read_text()) | change
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged .*run `edm2 report --lengths` again"):
        read_lengths(run)


def test_too_few_images(run, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(run), "--length-images", "1"])
    assert "--length-images 1 must be at least 2" in capsys.readouterr().err
