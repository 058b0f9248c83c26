"""Tuning by scores of ensembles on held-out cases."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edm2.cli import main
from edm2.commands.sampling import Sampling, with_saved
from edm2.data import ArrayDataset, PairedDataset, open_dataset
from edm2.forecast import Torus, read_forecast
from edm2.generate.members import member_seeds
from edm2.train import EMAConfig, NetworkConfig, TrainConfig, train
from edm2.tuning import TuningPlan, read_tuned, save_tuned, tune
from edm2.tuning.held_out import EnsembleJudge
from edm2.tuning.plan import HELD_OUT_SEED, SEARCH_SEED
from edm2.tuning.result import tuned_settings

PLAN = TuningPlan(samples=200, final_samples=80, repeats=2)
MEMBERS = 5


def pairs(count: int = 120) -> PairedDataset:
    """Images around their condition, with two channels of very different units."""
    rng = np.random.default_rng(0)
    condition = rng.standard_normal((count, 2, 6, 6)).astype(np.float32)
    unit = np.array([1.0, 1000.0])[:, None, None]
    images = (condition + rng.standard_normal(condition.shape)) * unit
    return PairedDataset(ArrayDataset(images.astype(np.float32)), ArrayDataset(condition))


class Making:
    """Stands in for a model: members around the condition, of a chosen spread."""

    def __init__(self, spread: float) -> None:
        self.spread, self.seen = spread, list[Any]()

    def __call__(self, seeds: list[int], *labels: np.ndarray, conditions: np.ndarray) -> np.ndarray:
        assert not labels
        self.seen.append((seeds, conditions))
        noise = np.stack([np.random.default_rng(s).standard_normal(conditions.shape[1:]) for s in seeds])
        made: np.ndarray = (conditions + self.spread * noise) * np.array([1.0, 1000.0])[:, None, None]
        return made


def test_scores_of_gaussians() -> None:
    data = pairs()
    judge = EnsembleJudge(data, PLAN, members=MEMBERS)
    seeds = range(SEARCH_SEED, SEARCH_SEED + PLAN.samples)
    right, wide = (judge.score_cases(Making(spread), seeds) for spread in (1.0, 2.0))
    # The images have variance 2, and the law of an image given its condition variance 1.
    assert right == pytest.approx(1 / math.sqrt(math.pi) / math.sqrt(2), rel=0.07)
    assert wide > 1.1 * right
    honest = EnsembleJudge(data, PLAN, metric="spread-skill", members=MEMBERS)
    assert honest.score_cases(Making(1.0), seeds) < 0.08
    assert honest.score_cases(Making(2.0), seeds) == pytest.approx(
        math.log(2 * math.sqrt(1.2 / 1.8)), abs=0.1
    )


def test_cases_of_search_and_final_measurements_are_different() -> None:
    judge, making = EnsembleJudge(pairs(), PLAN, members=MEMBERS), Making(1.0)
    starts = (SEARCH_SEED, HELD_OUT_SEED, HELD_OUT_SEED + PLAN.final_samples)
    for start, count in zip(starts, (PLAN.samples, *[PLAN.final_samples] * 2), strict=True):
        judge.score_cases(making, range(start, start + count))
    sets = [{c.tobytes() for c in conditions} for _, conditions in making.seen]
    assert [len(s) for s in sets] == [40, 16, 16]
    assert len(set.union(*sets)) == 72
    seeds = [set(seeds) for seeds, _ in making.seen]
    assert [len(s) for s in seeds] == [200, 80, 80]
    assert len(set.union(*seeds)) == 360
    # The same again: each choice of settings meets the same cases and noise.
    again = Making(1.0)
    judge.score_cases(again, range(SEARCH_SEED, SEARCH_SEED + PLAN.samples))
    assert again.seen[0][0] == making.seen[0][0]
    assert len(set(member_seeds(np.zeros(3), np.arange(3), seed=0))) == 3


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (ArrayDataset(np.zeros((9, 1, 4, 4), np.uint8)), {}, "has no conditions, which an ensemble is made for"),
        (pairs(), {"members": 1}, "members 1 must be at least 2"),
        (pairs(6), {}, "6 held-out cases of 5 members, .* too few for two cases each"),
    ],
)  # fmt: skip
def test_bad_input(data: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleJudge(data, PLAN, **{"members": MEMBERS, **changes})


def test_other_cases_are_another_score() -> None:
    prints = [
        EnsembleJudge(pairs(n), PLAN, metric=metric, members=members).fingerprint
        for n, metric, members in (
            (120, "crps", 5),
            (100, "crps", 5),
            (120, "spread-skill", 5),
            (120, "crps", 4),
        )
    ]
    assert len(set(prints)) == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs of the closed-form case, with held-out pairs beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    films = Torus(side=8).frames(torch.arange(60), 3, seed=0).numpy()
    for name, some in (("pairs.npz", films[:40]), ("held-out.npz", films[40:])):
        np.savez(folder / name, images=some[:, 2:], conditions=some[:, :2])
    network = NetworkConfig(
        model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
    )
    config = TrainConfig(
        data=str(folder / "pairs.npz"),
        num_images=320,
        batch_size=8,
        snapshot_images=40,
        record_magnitudes=False,
        network=network,
        ema=EMAConfig(sigma_rels=(0.05, 0.10)),
    )
    train(config, folder / "run", quiet=True)
    return folder / "run"


SEARCH = ["--samples", "12", "--final-samples", "12", "--repeats", "2", "--num-steps", "3", "--members", "2"]
SEARCH += [
    "--sigma-rels",
    "0.08",
    "0.1",
    "--guide-moments",
    "0.5",
    "--guide-factors",
    "1",
    "--guidances",
    "2",
]
SEARCH += ["--highs", "3", "--lows", "0.2"]


@pytest.mark.slow
def test_tuned_steps_and_churn_become_the_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = str(run.parent / "held-out.npz")
    main(["tune", str(run), "--metric", "crps", "--cases", held_out, *SEARCH])
    shown = capsys.readouterr().out
    assert "fair CRPS on held-out cases (6 in the search) with 2 members each, lower is better" in shown
    found = read_tuned(run)
    assert found is not None
    stages = {t.stage for t in found.tried}
    assert {"EMA length", "steps", "churn"} <= stages
    assert any(t.knobs.num_steps == 8 for t in found.tried)
    assert any(t.knobs.s_churn == 5.0 for t in found.tried)
    # As a search that found something better: its steps and churn are what forecasts use.
    knobs = dataclasses.replace(found.best, num_steps=8, s_churn=5.0)
    save_tuned(run, dataclasses.replace(found, best=knobs, held_out=[1.0, 1.01], baseline=[2.0, 2.02]))
    out = run.parent / "f.npz"
    main(
        [
            "forecast",
            str(run),
            "--start",
            held_out,
            "--steps",
            "2",
            "--members",
            "2",
            "--out",
            str(out),
            "--no-page",
        ]
    )
    sampler = read_forecast(out).settings["sampler"]
    assert (sampler["num_steps"], sampler["s_churn"]) == (8, 5.0)
    with np.load(held_out) as pairs_:
        np.testing.assert_array_equal(read_forecast(out).truth[:, :1, 0], pairs_["images"])  # type: ignore[index]


def test_the_schedule_is_found_and_told_whole(run: Path) -> None:
    assert TuningPlan(sigma_max=20.0, rho=5.0).range == {"sigma_max": 20.0, "rho": 5.0}
    plan = TuningPlan(
        sigma_rels=(0.08, 0.1), guide_moments=(), guidances=(), highs=(), lows=(), samples=12, final_samples=12,
        repeats=2, num_steps=3, sampler="dpmpp-2m", sigma_min=0.05, sigma_max=20.0, rho=5.0,
    )  # fmt: skip
    judge = EnsembleJudge(open_dataset(run.parent / "held-out.npz"), plan, members=2)
    found = tune(run, judge, plan)
    better = dataclasses.replace(found, held_out=[1.0, 1.01], baseline=[2.0, 2.02])
    save_tuned(run, better)
    schedule = {"sigma_min": 0.05, "sigma_max": 20.0, "rho": 5.0}
    assert read_tuned(run) == better
    assert schedule.items() <= tuned_settings(run)[0].items()
    chosen, _ = with_saved(Sampling(source=run, rho=3.0), run)
    assert (chosen.rho, chosen.sigma_max) == (3.0, 20.0)


@pytest.mark.slow
def test_words_that_do_not_fit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["tune", str(run), *words])
        return capsys.readouterr().err

    assert "--cases and --condition are for --metric crps and spread-skill" in fails("--cases", "x.npz")
    assert "churns (5.0,) are for the sampler heun, not for euler" in fails(
        "--churns", "5", "--sampler", "euler"
    )
