import dataclasses
import json
import math

import numpy as np
import pytest

from edm2.generate import ImageGenerator
from edm2.ladder import LadderPlan, run_ladder, with_length, write_ladder_report
from edm2.ladder import experiment as ladder_experiment
from edm2.ladder.experiment import growth, spread
from edm2.ladder.page import table
from edm2.presets import get_preset
from edm2.report.ladder_figures import growth_figure, ladder_figure
from edm2.train.signals import Stopped
from edm2.train.with_config import with_config

PLAN = LadderPlan(
    configs=("C", "G"), seeds=(0, 1), rate_factors=(1.0, 1e30), rate_images=32, sigma_rels=(0.05, 0.1),
    search_samples=24, final_samples=24, num_steps=2, sampler="euler",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(tiny_digits):
    return tiny_digits()


@pytest.fixture(scope="module")
def sampled():
    return []


@pytest.fixture(scope="module")
def done(tmp_path_factory, sampled, settings):
    """An experiment's rungs and folder; `sampled` has the seeds, steps and sampler of all images made."""
    out = tmp_path_factory.mktemp("ladder")
    images = ImageGenerator.images

    def spy(self, seeds, **options):
        sampled.append((seeds, options))
        return images(self, seeds, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageGenerator, "images", spy)
        return run_ladder(settings, PLAN, out, quiet=True), out


def test_every_configuration_has_every_seed_and_a_length_from_the_plan(done):
    rungs, out = done
    assert [rung.config for rung in rungs] == ["C", "G"]
    for rung in rungs:
        assert len(rung.frechet) == len(rung.images_per_second) == len(rung.by_length) == 2
        assert set(rung.sigma_rel) <= {0.05, 0.1}
        for best, scores in zip(rung.sigma_rel, rung.by_length, strict=True):
            assert scores[PLAN.sigma_rels.index(best)] == min(scores)
        assert all(math.isfinite(value) for value in rung.frechet)
    # Stored weights of G are kept normalised, those of C are free.
    assert rungs[1].weights == pytest.approx([1, 1], abs=1e-3)
    assert rungs[0].num_params != rungs[1].num_params
    assert [r["config"] for r in json.loads((out / "ladder.json").read_text())["rungs"]] == ["C", "G"]


def test_a_learning_rate_that_diverges_is_not_chosen(done):
    rungs, _ = done
    for rung in rungs:
        assert math.isinf(rung.rate_scores[1e30])
        assert rung.rate_factor == 1.0
        assert rung.rate_scores[1e30] > rung.rate_scores[1.0]


def test_a_second_call_trains_nothing_again(done, settings):
    rungs, out = done
    models = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    assert len(models) >= 4
    again = run_ladder(settings, PLAN, out, quiet=True)
    assert again == rungs
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")} == models


@pytest.mark.slow
def test_an_experiment_stopped_within_a_run_continues_there(done, settings, tmp_path, monkeypatch):
    rungs, _ = done
    plan = dataclasses.replace(PLAN, configs=("G",), seeds=(0,))
    trained, steps = ladder_experiment.train, []

    def stopping(config, run, **options):
        def on_step(trainer):
            steps.append((run.name, trainer.num_images))
            if run.name == "seed-0" and trainer.num_images == 32:
                trainer.request_stop()

        return trained(config, run, on_step=on_step, **options)

    monkeypatch.setattr(ladder_experiment, "train", stopping)
    with pytest.raises(Stopped):
        run_ladder(settings, plan, tmp_path, quiet=True)
    (again,) = run_ladder(settings, plan, tmp_path, quiet=True)
    assert len(steps) == len(set(steps))
    assert (again.frechet, again.by_length) == (rungs[1].frechet[:1], rungs[1].by_length[:1])


def test_results_are_measured_with_seeds_that_no_choice_saw(done, sampled):
    search = {s for seeds, _ in sampled for s in seeds if s < 2_000_000}
    final = {s for seeds, _ in sampled for s in seeds if s >= 2_000_000}
    assert (len(search), len(final)) == (24, 24)
    # Per configuration: two lengths for each of two runs, of which 1e30 diverges, and the two seeds' searches.
    assert [len(seeds) for seeds, _ in sampled] == [24] * len(sampled)
    assert sum(min(seeds) >= 2_000_000 for seeds, _ in sampled) == 4
    assert all(options == dict(num_steps=2, sampler="euler") for _, options in sampled)


def test_the_rate_takes_the_same_course_whatever_the_length():
    config = get_preset("digits")
    short = with_length(config, 4_400)
    assert (config.optimizer.ref_batches, short.optimizer.ref_batches) == (150, pytest.approx(15))
    assert short.optimizer.rampup_mimg == pytest.approx(440e-6)
    assert with_length(config, 440_000).optimizer.rampup_mimg == config.optimizer.rampup_mimg
    larger = with_length(config, batch_size=64)
    assert (larger.batch_size, larger.num_images, larger.optimizer.ref_batches) == (64, 44_000, 75)
    assert with_config(short, "D").optimizer.ref_batches == 0
    assert with_length(config) == config
    for bad in (dict(num_images=0), dict(batch_size=0)):
        with pytest.raises(ValueError, match=r"(num_images|batch_size) 0 must be at least 1"):
            with_length(config, **bad)


@pytest.mark.parametrize(
    ("plan", "training", "message"),
    [
        (dict(sampler="heun"), {}, "plan.sampler euler there, heun here"),
        (dict(final_samples=25), {}, "plan.final_samples 24 there, 25 here"),
        ({}, dict(num_images=72), "training.num_images 64 there, 72 here"),
    ],
)
def test_another_experiment_in_the_folder(done, plan, training, message, settings):
    _, out = done
    before = (out / "ladder.json").read_bytes()
    with pytest.raises(ValueError, match=rf"other settings \({message}\): choose another --out"):
        run_ladder(
            dataclasses.replace(settings, **training), dataclasses.replace(PLAN, **plan), out, quiet=True
        )
    assert (out / "ladder.json").read_bytes() == before


def test_damaged_file_of_an_experiment(tmp_path, settings):
    (tmp_path / "ladder.json").write_text("{")
    with pytest.raises(ValueError, match=r"ladder.json is damaged .*: move it away"):
        run_ladder(settings, PLAN, tmp_path, quiet=True)


SHORT = dataclasses.replace(
    PLAN,
    configs=("G",),
    seeds=(0,),
    rate_factors=(1.0,),
    sigma_rels=(0.1,),
    search_samples=2,
    final_samples=2,
)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_judgement(tmp_path, settings, content):
    found = tmp_path / "G" / "seed-0" / "judged.json"
    found.parent.mkdir(parents=True)
    found.write_text(content)
    with pytest.raises(ValueError, match=r"judged.json is damaged .*: delete it to judge this run again"):
        run_ladder(settings, SHORT, tmp_path, quiet=True)


@pytest.mark.slow
def test_other_images_under_the_same_name(tmp_path, settings):
    def write(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(40) % 10)

    settings = dataclasses.replace(settings, data=str(tmp_path / "images.npz"))
    write(0)
    run_ladder(settings, SHORT, tmp_path / "out", quiet=True)
    write(1)
    with pytest.raises(ValueError, match="holds another run"):
        run_ladder(settings, SHORT, tmp_path / "out", quiet=True)


@pytest.mark.slow
def test_another_process_with_other_configurations(tmp_path, settings):
    (rung,) = run_ladder(settings, SHORT, tmp_path, quiet=True)
    written = []

    def look(trained=ladder_experiment.train):
        def train(*args, **options):
            written.append(json.loads((tmp_path / "ladder.json").read_text())["configs"])
            return trained(*args, **options)

        return train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder_experiment, "train", look())
        (other,) = run_ladder(settings, dataclasses.replace(SHORT, configs=("F",)), tmp_path, quiet=True)
    # Beginning empties nothing.
    assert written == [["G"]]
    both = run_ladder(settings, dataclasses.replace(SHORT, configs=("F", "G")), tmp_path, quiet=True)
    assert both == [other, rung]


@pytest.mark.slow
def test_a_single_record_says_nothing_of_growth(tmp_path, settings):
    settings = dataclasses.replace(settings, record_magnitudes=False, log_images=settings.num_images)
    (rung,) = run_ladder(settings, SHORT, tmp_path, quiet=True)
    assert math.isnan(rung.activations[0])
    assert math.isnan(rung.weights[0])
    headers, (row,) = table([rung])
    assert row[headers.index("weights, last/first record")] == "unknown"


def test_report(done, settings):
    rungs, out = done
    page = write_ladder_report(rungs, settings, PLAN, out).read_text()
    for text in ("Architectural streamlining", "Learning rate", "EMA length", "6.96", "2.56"):
        assert text in page
    assert f"of the first, which comes after {settings.log_images:,} images" in page
    assert "ln σ of B to G has mean -0.4 and standard deviation 1; dropout: each conf" in page
    # Of two rates and two lengths each is the first or the last.
    for rung in rungs:
        assert (
            "ln σ of B to G has mean -0.4 and standard deviation 1; dropout: each configuration&#39;s own"
            in page
        )
        assert f"{rung.config}: the best rate factor, 1, is at an end of the range tried." in page
        assert f"{rung.config}: a best EMA length, " in page
    headers, rows = table(rungs)
    assert all(len(row) == len(headers) for row in rows)


def test_spread():
    assert spread([2.0]) == "2"
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert spread([2.0, 2.0001]) == "2"
    assert spread([math.nan, 3.0, math.nan, 1.0]) == "2 (1 to 3)"
    assert spread([math.nan]) == "unknown"


def test_diverged_runs_are_named_in_the_figure():
    figure = ladder_figure({"A": [math.inf, 2.0], "B": [1.0, 3.0]}, {"A": 8.0, "B": 7.0})
    assert "1 diverged" in [text.get_text() for text in figure.axes[0].texts]
    figure = ladder_figure({"A": [1.0, 1.1, 53.2], "B": [math.inf, 9.0, 2.0]}, {"A": 8.0, "B": 7.0})
    assert [text.get_text() for text in figure.axes[0].texts] == ["also 53.2", "1 diverged"]
    assert figure.axes[0].get_ylim()[1] < 20
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a run", "median"]


@pytest.mark.slow
def test_everything_diverged(tmp_path, settings):
    plan = dataclasses.replace(SHORT, configs=("C", "G"), rate_factors=(1e30,))
    rungs = run_ladder(settings, plan, tmp_path, quiet=True)
    assert [rung.frechet for rung in rungs] == [[math.inf], [math.inf]]
    headers, (row,) = table([dataclasses.replace(rungs[0], num_params=0)])
    assert row[headers.index("parameters")] == "unknown"
    page = write_ladder_report(rungs, settings, plan, tmp_path).read_text()
    assert "Every run diverged: try lower rate factors." in page
    assert "Left out, because a distance is not finite: C, G." in page


def test_growth_is_relative_to_the_first_record():
    records = [
        {"activations": {"a": 2.0, "b": 1.0}, "weights": {"a": 3.0, "b": 4.0}},
        {"activations": {"a": 3.0, "b": 8.0}, "weights": {"a": 6.0, "b": 8.0}},
    ]
    activations, weights = growth(records)
    assert (activations, weights) == ([1.0, 4.0], [1.0, pytest.approx(2.0)])
    figure = growth_figure({"A": ([10, 20], activations, weights), "G": ([10, 20], [1, 1], [1, 1])})
    drawn = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[1, 4], [1, 1]], [[1, pytest.approx(2)], [1, 1]]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["A", "G"]


@pytest.mark.slow
def test_other_lengths_are_made_of_the_same_runs(tmp_path, settings, monkeypatch):
    plan = dataclasses.replace(SHORT, sigma_rels=(0.001,))
    with pytest.raises(ValueError, match=r"sigma_rel 0\.001 .* cannot be expressed"):
        run_ladder(settings, plan, tmp_path, quiet=True)
    steps, trained = [], ladder_experiment.train
    monkeypatch.setattr(
        ladder_experiment, "train", lambda *a, **options: trained(*a, on_step=steps.append, **options)
    )
    (rung,) = run_ladder(settings, dataclasses.replace(plan, sigma_rels=(0.1,)), tmp_path, quiet=True)
    assert rung.sigma_rel == [0.1]
    assert not steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(configs=("A", "X")), "config 'X' is not one of A, B, C, D, E, F, G"),
        (dict(seeds=(1, 1)), r"seeds \(1, 1\) must be one or more different values"),
        (dict(sigma_rels=()), r"sigma_rels \(\) must be one or more"),
        (dict(final_samples=1), "final_samples 1 must be at least 2"),
        (dict(rate_images=0), "rate_images 0 must be at least 1"),
        (dict(sigma_rels=(0.1, 0.5)), r"sigma_rel 0\.5 is outside"),
        (dict(seeds=(0, 1000)), "seed 1000 belongs to the search for learning rates: choose other seeds"),
        (dict(search_samples=1_000_001), "would reach the seeds of the result: give at most 1000000"),
        (dict(sampler="plms"), "unknown sampler 'plms': there are heun, euler, dpmpp-2m"),
        (dict(rate_factors=(0.0,)), r"rate_factors \(0.0,\) must be above 0 and finite"),
        (dict(rate_factors=(1.0, math.nan)), r"rate_factors \(1.0, nan\) must be above 0 and finite"),
        (dict(seeds=(0, -1)), r"seeds \(0, -1\) must be 0 or more"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(ValueError, match=message):
        LadderPlan(**changes)


def test_data_without_classes(tmp_path, settings):
    config = settings
    config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, labels=False))
    with pytest.raises(ValueError, match="digits has no classes"):
        run_ladder(config, PLAN, tmp_path)
