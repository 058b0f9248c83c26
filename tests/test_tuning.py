import dataclasses
import json
import math

import numpy as np
import pytest

from edm2.cli import main
from edm2.presets import get_preset
from edm2.train import train
from edm2.tuning import BASELINE_SIGMA_REL, Knobs, TuningPlan, read_tuned, save_tuned, tune
from edm2.tuning_report import write_tuning_report

PLAN = TuningPlan(
    sigma_rels=(0.05, 0.08, 0.1), guide_moments=(0.25, 0.5), guide_factors=(1.0,), weights=(2.0,), highs=(8.0,),
    lows=(0.5,), samples=8, final_samples=8, repeats=2, num_steps=4,
)  # fmt: skip


class Brightness:
    """A score that can be checked: distance of the mean pixel from a wanted one."""

    fingerprint = "brightness"

    def __init__(self):
        self.calls = 0

    def distance(self, images):
        self.calls += 1
        return abs(float(images.mean()) - 100.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = get_preset("digits")
    network = dataclasses.replace(
        config.network,
        model_channels=8,
        channel_mult=(1,),
        attn_resolutions=(8,),
        num_blocks=1,
        channels_per_head=8,
    )
    config = dataclasses.replace(config, num_images=320, batch_size=8, snapshot_images=40, network=network)
    out = tmp_path_factory.mktemp("tuning") / "run"
    train(config, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def found(run):
    return tune(run, Brightness(), PLAN)


def test_stages_go_from_the_best_so_far(found):
    stages = [t.stage for t in found.tried]
    assert stages == sorted(stages, key=list(dict.fromkeys(stages)).index)
    assert stages.count("EMA length") == 3
    assert stages.count("guide") == 2
    assert len({t.knobs for t in found.tried}) == len(found.tried)
    assert min(t.score for t in found.tried) == next(t.score for t in found.tried if t.knobs == found.best)
    best_length = min(found.tried[:3], key=lambda t: t.score).knobs.sigma_rel
    assert {t.knobs.sigma_rel for t in found.tried if t.stage == "guide"} == {best_length}
    assert {t.knobs.guide_images for t in found.tried if t.stage == "guide"} == {80.0, 160.0}


def test_held_out_scores_are_of_other_seeds(found):
    assert len(found.held_out) == len(found.baseline) == 2
    assert len({*found.held_out, min(t.score for t in found.tried)}) == 3
    assert found.improvement == pytest.approx(1 - np.mean(found.held_out) / np.mean(found.baseline))


def test_an_interrupted_search_evaluates_nothing_twice(run, found):
    score = Brightness()
    again = tune(run, score, PLAN)
    assert again == found
    assert score.calls == 0
    log = run / "tuning" / "evaluations.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:3]) + '\n{"key": "cut sh')
    assert tune(run, score, PLAN) == found
    assert score.calls == len(lines) - 3


def test_tuned_settings_are_saved_and_read_back(run, found):
    folder = save_tuned(run, found, PLAN)
    assert read_tuned(run) == (found.best, 4)
    content = json.loads((folder / "tuned.json").read_text())
    assert len(content["tried"]) == len(found.tried)
    assert (folder / "model.safetensors").exists()
    assert (folder / "guide.safetensors").exists() == (found.best.guide_images is not None)
    (folder / "tuned.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tuned\.json is damaged"):
        read_tuned(run)
    save_tuned(run, found, PLAN)


def test_report_has_a_curve_a_stage_and_a_ranking(run, found, tmp_path):
    page = write_tuning_report(found, PLAN, tmp_path / "report.html", title="Tuning <it>").read_text()
    assert "Tuning &lt;it&gt;" in page
    assert page.count("<img") == len({t.stage for t in found.tried})
    assert found.best.describe() in page


def test_no_search_where_there_is_nothing_to_search_in(tmp_path):
    assert read_tuned(tmp_path) is None
    with pytest.raises(ValueError, match="samples 0 must be at least 1"):
        TuningPlan(samples=0)
    with pytest.raises(ValueError, match="sigma_rels is empty"):
        TuningPlan(sigma_rels=())
    with pytest.raises(ValueError, match=r"guide_moments \(1.5,\) must lie between 0 and 1"):
        TuningPlan(guide_moments=(1.5,))


def test_words_of_knobs():
    assert Knobs(sigma_rel=BASELINE_SIGMA_REL).describe() == "EMA 0.1"
    knobs = Knobs(
        sigma_rel=0.05, guide_images=3000, guide_sigma_rel=0.1, guidance=1.5, interval=(0.5, math.inf)
    )
    assert (
        knobs.describe() == "EMA 0.05, guide of 3,000 images with EMA 0.1, weight 1.5 for sigma in (0.5, inf]"
    )


def test_sample_takes_the_tuned_settings_unless_told_otherwise(run, found, tmp_path, capsys):
    save_tuned(run, dataclasses.replace(found, best=Knobs(sigma_rel=0.08)), PLAN)
    main(["sample", str(run), "--seeds", "0-3", "--out", str(tmp_path / "tuned")])
    assert "tuned settings: EMA 0.08" in capsys.readouterr().err
    settings = json.loads((tmp_path / "tuned" / "samples.json").read_text())
    assert settings["model"]["sigma_rel"] == pytest.approx(0.08)
    assert settings["sampler"]["num_steps"] == 4
    main(["sample", str(run), "--ema", "0.05", "--seeds", "0-3", "--out", str(tmp_path / "chosen")])
    assert "tuned" not in capsys.readouterr().err
    settings = json.loads((tmp_path / "chosen" / "samples.json").read_text())
    assert settings["model"]["sigma_rel"] == pytest.approx(0.05)


def test_command_line(run, capsys):
    words = "--sigma-rels 0.05 0.1 --guide-moments 0.5 --guide-factors 1 --weights 2 --highs 8 --lows 0.5"
    sizes = "--samples 16 --final-samples 16 --repeats 1 --num-steps 2"
    main(["tune", str(run), *words.split(), *sizes.split()])
    out = capsys.readouterr().out
    assert out.count("EMA length") >= 2
    assert "Frechet distance with held-out seeds" in out
    assert (run / "tuning" / "report.html").exists()
