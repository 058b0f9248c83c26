import dataclasses
import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest

from edm2.cli import main
from edm2.diffusion import consistency_steps
from edm2.ema.storage.manifest import read_manifest, write_manifest
from edm2.generate import ImageGenerator
from edm2.presets import get_preset
from edm2.train import train
from edm2.tuning import TuningPlan, bench, search, tune
from edm2.tuning.page import verdict, write_tuning_report
from edm2.tuning.result import BASELINE_SIGMA_REL, Knobs, Tuned, half_interval, read_tuned, save_tuned

PLAN = TuningPlan(
    sigma_rels=(0.05, 0.08, 0.1), guide_moments=(0.25, 0.5), guide_factors=(1.0,), guidances=(2.0,), highs=(8.0,),
    lows=(0.5,), samples=8, final_samples=8, repeats=2, num_steps=4, sampler="dpmpp-2m",
)  # fmt: skip


class Brightness:
    """A score that can be checked: distance of the mean pixel from a wanted one."""

    fingerprint = metric = "brightness"
    features = "the mean pixel"

    def __init__(self):
        self.calls = 0

    def distance(self, images):
        self.calls += 1
        return abs(float(images.mean()) - 100.0)


class Preferring:
    """Stands in for images and their score: gives each setting a wanted score and remembers what was asked for."""

    fingerprint = metric = "preference"
    features = "knobs"

    def __init__(self, monkeypatch, wanted):
        self.asked, self.wanted = [], wanted
        monkeypatch.setattr("edm2.tuning.bench.Bench.images", lambda _, knobs, seeds: self.ask(knobs, seeds))

    def ask(self, knobs, seeds):
        self.asked.append((knobs, seeds))
        return self.wanted(knobs)

    def distance(self, images):
        return images


@pytest.fixture
def fresh(run, tmp_path):
    """The run without evaluations."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tuning"))
    return tmp_path / "run"


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


def test_held_out_seeds_are_other_seeds_and_the_same_for_both(fresh, monkeypatch):
    score = Preferring(monkeypatch, lambda knobs: knobs.sigma_rel)
    plan = dataclasses.replace(PLAN, samples=50, final_samples=30, repeats=3)
    tuned = tune(fresh, score, plan)
    searched, final = (set(seeds) for seeds in (score.asked[0][1], []))
    assert all(set(seeds) == searched for _, seeds in score.asked[:-6])
    blocks = [seeds for _, seeds in score.asked[-6:]]
    assert blocks[:3] == blocks[3:]
    for block in blocks[:3]:
        assert len(block) == 30
        assert not searched & set(block)
        assert not final & set(block)
        final |= set(block)
    assert {knobs for knobs, _ in score.asked[-6:-3]} == {tuned.best}
    assert {knobs for knobs, _ in score.asked[-3:]} == {Knobs(sigma_rel=BASELINE_SIGMA_REL)}
    with pytest.raises(
        ValueError, match="samples 1000001 would reach the held-out seeds: give at most 1000000"
    ):
        TuningPlan(samples=1_000_001)


def test_images_are_of_the_seeds_and_the_sampler_asked_for(run, found):
    generator = ImageGenerator.load(run, BASELINE_SIGMA_REL)
    images = generator.images(range(4_000_008, 4_000_016), num_steps=4, sampler="dpmpp-2m")
    assert found.baseline[1] == pytest.approx(abs(float(images.mean()) - 100.0))


def test_improvement_is_paired_with_its_confidence():
    tuned = Tuned(
        best=Knobs(sigma_rel=0.1), num_steps=4, sampler="heun", tried=[],
        held_out=[6.0, 14.0, 7.5], baseline=[10.0, 20.0, 10.0],
    )  # fmt: skip
    assert tuned.improvements == pytest.approx([0.4, 0.3, 0.25])
    assert tuned.improvement == pytest.approx(0.95 / 3)
    # Student's t of 2 degrees of freedom is 4.302653.
    error = 4.302653 * statistics.stdev([0.4, 0.3, 0.25]) / math.sqrt(3)
    assert tuned.improvement_error == pytest.approx(error)
    assert tuned.is_better
    assert verdict(tuned) == "lower by 31.7% (95% confidence 12.7 to 50.6%; repeats 40.0 30.0 25.0)"
    once = dataclasses.replace(tuned, held_out=[6.0], baseline=[10.0])
    assert once.improvement_error is None
    assert not once.is_better
    assert verdict(once) == "change of -40.0% in one repeat, which has no confidence interval"


def worse(found):
    return dataclasses.replace(found, held_out=[10.2, 10.4], baseline=[10.0, 10.1])


def better(found):
    return dataclasses.replace(found, held_out=[5.0, 5.1], baseline=[10.0, 10.1])


def test_what_is_not_better_is_not_called_lower(found):
    tuned = worse(found)
    assert not tuned.is_better
    told = "nothing better than EMA 0.1, no guidance was found; change of +2.5% (95% confidence -"
    assert verdict(tuned).startswith(told)
    assert verdict(tuned).endswith("repeats +2.0 +3.0)")
    same = dataclasses.replace(found, held_out=[10.0, 10.1], baseline=[10.0, 10.1])
    assert not same.is_better
    assert "change of +0.0% (95% confidence +0.0 to +0.0%" in verdict(same)


def test_only_what_is_better_becomes_the_default(run, found, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tuning"))
    copy = tmp_path / "run"
    folder = save_tuned(copy, better(found))
    assert (folder / "model.safetensors").exists()
    save_tuned(copy, worse(found))
    assert not list(folder.glob("*.safetensors"))
    assert read_tuned(copy) == worse(found)
    main(["sample", str(copy), "--seeds", "0-3", "--out", str(tmp_path / "out")])
    assert "tuning found nothing better than EMA 0.1 without guidance" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert settings["model"]["sigma_rel"] == ImageGenerator.load(copy).info["sigma_rel"]
    page = write_tuning_report(worse(found), PLAN, tmp_path / "report.html", title="t").read_text()
    assert "change, not significant" in page
    assert "lower by" not in page


def test_the_moment_is_fixed_when_the_search_starts(fresh, tmp_path, capsys):
    """A run that trains on: snapshots appear while the search goes on, and after it."""
    later, manifest = tmp_path / "later.json", fresh / "snapshots" / "manifest.json"
    shutil.copy(manifest, later)
    whole = read_manifest(fresh / "snapshots")
    early = tuple(s for s in whole.snapshots if s.t <= 160)
    write_manifest(fresh / "snapshots", dataclasses.replace(whole, snapshots=early))
    asked = set()

    class Growing(Brightness):
        def distance(self, images):
            shutil.copy(later, manifest)
            return super().distance(images)

    load = ImageGenerator.load

    def recording(path, sigma_rel, *, num_images, **options):
        asked.add(num_images)
        return load(path, sigma_rel, num_images=num_images, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edm2.tuning.bench.ImageGenerator.load", recording)
        tuned = tune(fresh, Growing(), PLAN)
    assert max(asked) == tuned.num_images == 160
    assert tuned == tune(fresh, Brightness(), dataclasses.replace(PLAN, num_images=170))
    assert tuned.baseline != tune(fresh, Brightness(), PLAN).baseline
    with pytest.raises(
        ValueError, match=r"num_images 10 is before the first snapshot of .*, at 40: give at least"
    ):
        tune(fresh, Brightness(), dataclasses.replace(PLAN, num_images=10))
    folder = save_tuned(fresh, better(tuned))
    assert load(folder / "model.safetensors").info["num_images"] == 160
    main(["sample", str(fresh), "--seeds", "0-3", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert (
        "tuned after 160 training images, and the newest snapshot, which is sampled, comes after 320" in told
    )
    save_tuned(fresh, dataclasses.replace(better(tuned), num_images=320))
    main(["sample", str(fresh), "--seeds", "0-3", "--out", str(tmp_path / "out2")])
    assert "newest snapshot" not in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 3, 11, 12, 13, 40])
def test_confidence_interval_holds_the_mean_95_times_in_100(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=(20_000, count))
    covered = [abs(row.mean()) < half_interval(row) for row in values]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.005)


def test_nothing_is_evaluated_that_gives_images_known_already(fresh, monkeypatch):
    # Four steps have the levels 80, 9.7, 0.47 and 0.002.
    plan = dataclasses.replace(
        PLAN, guidances=(1.0, 1.2, 2.0), highs=(100.0, 8.0, 3.0), lows=(0.001, 0.2, 0.3, 0.5)
    )
    score = Preferring(monkeypatch, lambda k: 10 * k.sigma_rel - k.guidance - 1 / (1 + k.interval[1]))
    tried = tune(fresh, score, plan).tried
    assert [t.knobs.guidance for t in tried if t.stage == "guidance weight"] == [1.2, 2.0]
    assert [t.knobs.interval for t in tried if t.stage == "interval, upper end"] == [(0, 8.0)]
    assert [t.knobs.interval for t in tried if t.stage == "interval, lower end"] == [(0.2, 8.0)]
    assert len(tried) <= plan.most_evaluations == 3 + 2 + 3 + 3 + 3 + 4


def test_guidance_that_does_harm_gets_lower_weights_and_no_interval(fresh, monkeypatch):
    plan = dataclasses.replace(PLAN, guidances=(1.2, 1.35, 2.0, 2.5))
    score = Preferring(monkeypatch, lambda k: k.sigma_rel + k.guidance)
    tuned = tune(fresh, score, plan)
    assert [t.knobs.guidance for t in tuned.tried if t.stage == "guidance weight"] == [1.2, 1.35]
    assert {t.stage for t in tuned.tried} == {"EMA length", "guide", "guidance weight"}
    assert tuned.best == Knobs(sigma_rel=0.05)


def test_a_guide_that_helps_at_a_lower_weight_alone_is_found(fresh, monkeypatch):
    plan = dataclasses.replace(PLAN, guidances=(1.2, 2.0))
    score = Preferring(monkeypatch, lambda k: k.sigma_rel + abs(k.guidance - 1.2))
    tuned = tune(fresh, score, plan)
    assert tuned.best.guidance == 1.2
    assert any(t.stage == "interval, upper end" for t in tuned.tried)


def test_a_guide_that_is_the_network_itself_is_none(tmp_path, fresh, monkeypatch):
    plan = dataclasses.replace(PLAN, guide_moments=(0.99,), guide_factors=(1.0, 2.0))
    tuned = tune(fresh, Preferring(monkeypatch, lambda k: k.sigma_rel), plan)
    guides = [t.knobs for t in tuned.tried if t.stage == "guide"]
    assert [(k.guide_images, k.guide_sigma_rel) for k in guides] == [(320.0, 0.1)]


def refusing(monkeypatch, refused):
    """Stands in for snapshots that cannot give some averages."""
    wanted = bench.reconstruct_many

    def reconstruct_many(folder, targets, t, **options):
        if refused(targets[0], t):
            raise ValueError(f"{targets[0]:g} is too long")
        return wanted(folder, targets, t, **options)

    monkeypatch.setattr(bench, "reconstruct_many", reconstruct_many)


def test_averages_that_the_snapshots_cannot_give_are_skipped_and_named(fresh, monkeypatch):
    refusing(monkeypatch, lambda length, t: (length, t) in ((0.05, 320.0), (0.08, 80.0)))
    score = Preferring(monkeypatch, lambda k: k.sigma_rel)
    with pytest.warns(UserWarning, match="skipped") as caught:
        tried = tune(fresh, score, PLAN).tried
    assert [str(warning.message) for warning in caught] == [
        "skipped EMA 0.05: 0.05 is too long",
        "skipped EMA 0.08, guide of 80 images with EMA 0.08, weight 1.5: 0.08 is too long",
    ]
    assert [t.knobs.sigma_rel for t in tried[:2]] == [0.08, 0.1]
    assert {t.knobs.guide_images for t in tried if t.stage == "guide"} == {160.0}


def test_guidance_that_leaves_the_finite_numbers_is_skipped(fresh, monkeypatch):
    def wanted(knobs):
        if knobs.guidance == 2:
            raise FloatingPointError("not finite")
        return knobs.sigma_rel - knobs.guidance

    with pytest.warns(UserWarning, match=r"skipped .* weight 2: not finite"):
        tried = tune(fresh, Preferring(monkeypatch, wanted), PLAN).tried
    assert max(t.knobs.guidance for t in tried) == 1.5


def test_no_search_without_a_length_or_a_comparison(fresh, monkeypatch):
    refusing(monkeypatch, lambda length, t: length == 0.1)
    with pytest.raises(ValueError, match=r"nothing to compare tuned settings with: 0\.1 is too long"):
        tune(fresh, Brightness(), PLAN)
    plan = dataclasses.replace(PLAN, sigma_rels=(0.05, 0.08))
    refusing(monkeypatch, lambda length, t: length < 0.1)
    monkeypatch.setattr(search, "BASELINE_SIGMA_REL", 0.2)
    with (
        pytest.warns(UserWarning, match="skipped EMA"),
        pytest.raises(ValueError, match=r"give none of the EMA lengths \(0\.05, 0\.08\)"),
    ):
        tune(fresh, Brightness(), plan)


def test_an_interrupted_search_evaluates_nothing_twice(run, found):
    score = Brightness()
    again = tune(run, score, PLAN)
    assert again == found
    assert score.calls == 0
    log = run / "tuning" / "evaluations.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:3]) + '\n{"key": "cut sh')
    with pytest.warns(UserWarning, match=r"evaluations\.jsonl: line 4 is damaged"):
        assert tune(run, score, PLAN) == found
    assert score.calls == len(lines) - 3
    assert tune(run, score, PLAN) == found
    assert score.calls == len(lines) - 3
    other = tune(run, score, dataclasses.replace(PLAN, sampler="euler"))
    assert other.held_out != found.held_out


def test_tuned_settings_are_saved_and_read_back(run, found):
    found = better(found)
    folder = save_tuned(run, found)
    assert read_tuned(run) == found
    content = json.loads((folder / "tuned.json").read_text())
    assert content["improvements"] == found.improvements
    assert len(content["tried"]) == len(found.tried)
    assert (folder / "model.safetensors").exists()
    assert (folder / "guide.safetensors").exists() == (found.best.guide_images is not None)
    text = (folder / "tuned.json").read_text()
    del content["sha256"], content["sampler"]
    for damaged in (text.replace("0.08", "0.09"), "{}", "[]", json.dumps(content), text[:-9], "[" * 10**5):
        (folder / "tuned.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tuned\.json is damaged"):
            read_tuned(run)
    hostile = {
        "sampler": [["os.system"]],
        "held_out": ["a"],
        "baseline": [],
        "num_steps": None,
        "num_images": "9",
    }
    for name, value in hostile.items():
        (folder / "tuned.json").write_text(json.dumps({**content, "sampler": found.sampler, name: value}))
        with pytest.raises(ValueError, match=r"tuned\.json is damaged"):
            read_tuned(run)
    save_tuned(run, found)


def test_report_has_a_curve_a_stage_and_a_ranking(run, found, tmp_path):
    page = write_tuning_report(found, PLAN, tmp_path / "report.html", title="Tuning <it>").read_text()
    assert "Tuning &lt;it&gt;" in page
    assert page.count("<img") == len({t.stage for t in found.tried})
    assert found.best.describe() in page
    assert f"scatter by {statistics.stdev(found.held_out):.3g} (standard deviation, the bars)" in page
    other = dataclasses.replace(PLAN, final_samples=9)
    page = write_tuning_report(found, other, tmp_path / "report.html", title="t").read_text()
    assert "scatter by" not in page


def test_no_search_where_there_is_nothing_to_search_in(tmp_path):
    assert read_tuned(tmp_path) is None
    for options, told in (
        (dict(samples=1), "samples 1 must be at least 2"),
        (dict(final_samples=1), "final_samples 1 must be at least 2"),
        (dict(repeats=1), "repeats 1 must be at least 2"),
        (dict(sigma_rels=(0.1, 0.05)), r"sigma_rels \(0\.1, 0\.05\) must ascend, each length once"),
        (dict(sigma_rels=(0.1, 0.1)), "must ascend, each length once"),
        (dict(guidances=(1.5, 1.5)), r"guidances \(1\.5, 1\.5\) must be different values"),
        (dict(highs=(0.001,)), r"highs \(0\.001,\) .* hold some of the sampler's noise levels, 0\.002 to 80"),
        (dict(lows=(90.0,)), r"lows \(90\.0,\) must be ends of intervals that hold some"),
    ):
        with pytest.raises(ValueError, match=told):
            TuningPlan(**options)
    with pytest.raises(ValueError, match="sigma_rels is empty"):
        TuningPlan(sigma_rels=())
    with pytest.raises(ValueError, match=r"guide_moments \(1.5,\) must lie between 0 and 1"):
        TuningPlan(guide_moments=(1.5,))
    with pytest.raises(ValueError, match=r"sigma_rel 0.5 is outside \(0, 0.2887\]"):
        TuningPlan(sigma_rels=(0.1, 0.5))
    with pytest.raises(ValueError, match=r"guidances \(nan,\) must be positive and finite"):
        TuningPlan(guidances=(math.nan,))
    with pytest.raises(ValueError, match="unknown sampler 'rk4': there are heun, euler, dpmpp-2m"):
        TuningPlan(sampler="rk4")


def test_words_of_knobs():
    assert Knobs(sigma_rel=BASELINE_SIGMA_REL).describe() == "EMA 0.1"
    knobs = Knobs(
        sigma_rel=0.05, guide_images=3000, guide_sigma_rel=0.1, guidance=1.5, interval=(0.5, math.inf)
    )
    assert (
        knobs.describe() == "EMA 0.05, guide of 3,000 images with EMA 0.1, weight 1.5 for sigma in (0.5, inf]"
    )


def test_sample_takes_the_tuned_settings_unless_told_otherwise(run, found, tmp_path, capsys):
    save_tuned(run, dataclasses.replace(better(found), best=Knobs(sigma_rel=0.08)))
    main(["sample", str(run), "--seeds", "0-3", "--out", str(tmp_path / "tuned")])
    assert "tuned settings: EMA 0.08" in capsys.readouterr().err
    settings = json.loads((tmp_path / "tuned" / "samples.json").read_text())
    assert settings["model"]["sigma_rel"] == pytest.approx(0.08)
    assert settings["sampler"]["num_steps"] == 4
    assert settings["sampler"]["name"] == "dpmpp-2m"
    plain = ["--guidance", "1", "--num-steps", "2", "--out", str(tmp_path / "plain")]
    main(["sample", str(run), "--seeds", "0-3", *plain])
    assert "tuned" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--guide-images", "80", "--seeds", "0-3", "--out", str(tmp_path / "g")])
    assert "--guide-images 80 needs --guide-ema, the guide's EMA length" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()
    main(["sample", str(run), "--ema", "0.05", "--seeds", "0-3", "--out", str(tmp_path / "chosen")])
    assert "tuned" not in capsys.readouterr().err
    settings = json.loads((tmp_path / "chosen" / "samples.json").read_text())
    assert settings["model"]["sigma_rel"] == pytest.approx(0.05)


def test_networks_are_opened_on_the_device(fresh, monkeypatch, run):
    asked, load = [], ImageGenerator.load

    def recording(*args, device, **options):
        asked.append(device)
        return load(*args, device=device, **options)

    monkeypatch.setattr("edm2.tuning.bench.ImageGenerator.load", recording)
    tune(fresh, Brightness(), dataclasses.replace(PLAN, highs=(), lows=()), device="cpu:0")
    assert set(asked) == {"cpu:0"}
    with pytest.raises(SystemExit):
        main(["tune", str(run), "--device", "gpu"])


@pytest.mark.slow
def test_command_line(run, capsys):
    words = "--sigma-rels 0.05 0.1 --guide-moments 0.5 --guide-factors 1 --guidances 2 --highs 8 --lows 0.5"
    sizes = "--samples 16 --final-samples 16 --repeats 2 --num-steps 2 --sampler euler"
    main(["tune", str(run), *words.split(), *sizes.split()])
    out = capsys.readouterr().out
    assert out.count("EMA length") >= 2
    assert "Frechet distance with held-out seeds" in out
    assert re.search(r"(lower by|change of) \S+% \(95% confidence \S+ to \S+%; repeats \S+ \S+\)", out)
    assert out.startswith(
        "Frechet distance in features of a classifier trained on the run's own images, lower is better\n"
        "   1/8  EMA length"
    )
    assert (run / "tuning" / "report.html").exists()
    assert "tuned after 320 training images\n" in out


def test_a_run_under_way_says_which_snapshot_is_tuned(fresh, capsys):
    (fresh / "model.safetensors").unlink()
    words = (
        "--sigma-rels 0.1 --guide-moments 0.5 --guide-factors 1 --guidances --highs --lows --num-images 200"
    )
    sizes = "--samples 8 --final-samples 8 --repeats 2 --num-steps 2 --sampler euler"
    main(["tune", str(fresh), *words.split(), *sizes.split()])
    printed = capsys.readouterr()
    assert "so its snapshot after 200 training images is tuned; to continue this search after" in printed.err
    assert "add --num-images 200" in printed.err
    assert "next: edm2 sample " in printed.err
    assert "tuned after 200 training images\n" in printed.out


def test_a_student_is_tuned_by_its_noise_levels(fresh, monkeypatch, tmp_path):
    manifest = read_manifest(fresh / "snapshots")
    metadata = manifest.run.metadata
    metadata["info"]["consistency"] = {"teacher": "t", "sigma_max": 40.0}
    write_manifest(
        fresh / "snapshots",
        dataclasses.replace(manifest, run=dataclasses.replace(manifest.run, metadata=metadata)),
    )
    plan = TuningPlan.for_run(fresh)
    assert (plan.sampler, plan.num_steps, plan.is_for_student) == ("consistency", 2, True)
    plan = dataclasses.replace(
        plan, sigma_rels=(0.05, 0.08), num_steps=3, level_factors=(0.5, 2.0), samples=4, final_samples=4
    )

    def wanted(knobs):  # levels far apart, and then a longer average
        high, low = knobs.levels or (1.5, 0.4)
        return low / high + (0.1 if (knobs.sigma_rel == 0.08) == (knobs.levels is None) else 0.0)

    score = Preferring(monkeypatch, wanted)
    tuned = tune(fresh, score, plan)
    assert len(tuned.tried) <= plan.most_evaluations
    assert list(dict.fromkeys(t.stage for t in tuned.tried)) == [
        "EMA length", "noise levels", "each noise level", "EMA length once more",
    ]  # fmt: skip
    tried = next(t.knobs.levels for t in tuned.tried if t.stage == "noise levels")
    assert tried == pytest.approx((0.5 * consistency_steps(3, sigma_max=40.0)[1:-1]).tolist())
    assert tuned.best.sigma_rel == 0.08
    assert tuned.best.levels[0] > 8 * tuned.best.levels[1]
    assert "noise levels " in tuned.best.describe()
    monkeypatch.undo()
    save_tuned(fresh, dataclasses.replace(better(tuned), held_out=[5.0, 5.1], baseline=[10.0, 10.1]))
    assert read_tuned(fresh).best == tuned.best
    main(["sample", str(fresh), "--seeds", "0-3", "--out", str(tmp_path / "out")])
    made = json.loads((tmp_path / "out" / "samples.json").read_text())["sampler"]
    assert (made["name"], made["num_steps"]) == ("consistency", 3)
    assert made["levels"] == list(tuned.best.levels)
    main(["sample", str(fresh), "--seeds", "0-3", "--num-steps", "1", "--out", str(tmp_path / "one")])
