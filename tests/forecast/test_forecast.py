"""Roll-outs and what is written of them, with the exact model of the closed-form case."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashes import KINDS, check_every_interruption

from edm2.data import FloatCoding
from edm2.forecast import Cases, Forecast, Torus, make_forecast, past_frames, read_cases, roll_out
from edm2.forecast.page import write_forecast_page
from edm2.generate import ImageGenerator
from edm2.generate.checks import warn_of_strange
from edm2.generate.members import member_seeds
from edm2.metrics.ensemble import score_ensemble
from edm2.train.coding import Coding

TORUS = Torus()
OPTIONS: dict[str, Any] = dict(num_steps=4, sampler="dpmpp-2m")


def cases(count: int, leads: int = 3) -> Cases:
    frames = TORUS.frames(torch.arange(count), 2 + leads, seed=5).numpy()[:, :, None]
    return Cases(start=frames[:, :2], truth=frames[:, 2:])


def test_a_member_is_a_function_of_seed_case_and_member() -> None:
    case, member = np.arange(6).repeat(4), np.tile(np.arange(4), 6)
    seeds = member_seeds(case, member, seed=1)
    assert len(set(seeds)) == 24
    assert all(0 <= s < 2**63 for s in seeds)
    assert member_seeds(np.array([3]), np.array([2]), seed=1) == [seeds[14]]
    others = [member_seeds(case, member, seed=2), member_seeds(case, member, seed=1, step=1)]
    assert all(not set(seeds) & set(other) for other in others)
    shared = member_seeds(case, member, seed=1, common=True)
    assert len(set(shared)) == 4
    assert shared[:4] == shared[4:8]
    assert not set(shared) & set(seeds)


def test_a_rollout_does_not_depend_on_the_batch(exact: ImageGenerator) -> None:
    start = cases(2).start
    rows, members = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    whole = roll_out(exact, start[rows], rows, members, steps=3, seed=4, **OPTIONS)
    assert whole.shape == (4, 3, 1, 16, 16)
    alone = roll_out(exact, start[1:], rows[3:], members[3:], steps=2, seed=4, **OPTIONS)
    np.testing.assert_allclose(alone[0], whole[3, :2], atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


class Recording(ImageGenerator):
    """Stands in for a model with vectors: the next frame is the last one plus the vector."""

    def images(self, seeds: Any, labels: Any = None, **given: Any) -> np.ndarray:  # type: ignore[override]
        assert labels.tolist() == [1, 0]
        frame: np.ndarray = given["conditions"][:, -1:] + given["vectors"][:, :, None, None]
        return frame


def test_each_step_gets_its_vectors(exact: ImageGenerator) -> None:
    model = Recording(exact.denoiser, exact.coding)
    vectors = np.array([[[1.0], [10.0]], [[2.0], [20.0]]], np.float32)
    start = cases(2).start
    made = roll_out(
        model, start, np.arange(2), np.zeros(2, int), steps=2, vectors=vectors, labels=np.array([1, 0])
    )
    np.testing.assert_allclose(made[:, 1, 0], start[:, 1, 0] + vectors.sum((1, 2))[:, None, None], rtol=1e-5)


def test_what_the_model_was_not_trained_for_is_told(exact: ImageGenerator, tmp_path: Path) -> None:
    vectors = FloatCoding(mean=(3.0,), std=(1.0,), sigma_data=1.0)
    coding = dataclasses.replace(exact.coding, vectors=vectors)
    model, given = ImageGenerator(exact.denoiser, coding), cases(2)
    lead_times = np.tile(np.array([2.0, 12.0])[:, None], (2, 1, 1))
    far = dataclasses.replace(given, vectors=lead_times)
    wanted = r"entry 0 of the vectors reaches 12, and in training it was 3 with a standard deviation of 1"
    with pytest.warns(UserWarning, match=wanted), pytest.raises(ValueError, match="vectors"):
        make_forecast(model, far, tmp_path / "f.npz", steps=2, members=1, quiet=True, **OPTIONS)
    ranged = dataclasses.replace(coding, vector_range=((1.0,), (6.0,)))
    model.coding = Coding.from_json(json.loads(json.dumps(ranged.to_json())))
    beyond = dataclasses.replace(given, vectors=np.tile(np.array([1.0, 7.0])[:, None], (2, 1, 1)))
    wanted = (
        r"entry 0 of the vectors reaches 7, and in training it was between 1 and 6: the model was not trained"
    )
    with pytest.warns(UserWarning, match=wanted):
        warn_of_strange(model, None, beyond.vectors)
    warn_of_strange(model, None, np.array([[1.0], [6.0]]))
    for low, high in (([1.0, 2.0], [6.0]), ([math.nan], [6.0]), ([6.0], [6.0])):
        content = ranged.to_json()
        content["vectors"] |= {"low": low, "high": high}
        with pytest.raises(ValueError, match="must have 1 finite values each, low below high"):
            Coding.from_json(content)
    with pytest.raises(
        ValueError, match=r"vectors for each step must be \[N, 3, 1\] with the starts; not \[2, 2, 1\]"
    ):
        make_forecast(model, far, tmp_path / "f.npz", steps=3, members=1, quiet=True)


def test_common_noise_leaves_the_difference_of_the_starts(exact: ImageGenerator) -> None:
    start = cases(2).start
    rows, members = np.array([0, 1]), np.array([7, 7])
    # Long waves are above a thousandth of the default highest noise level, and would keep that part of the start.
    options: dict[str, Any] = dict(num_steps=40, sigma_max=10_000)
    made = roll_out(exact, start, rows, members, steps=3, seed=0, common=True, **options)
    law = TORUS.law(torch.from_numpy(start[:, :, 0]), 3)[0].numpy()[:, :, None]
    # The exact denoiser is linear: with the same noise the members differ as their means do.
    np.testing.assert_allclose(made[0] - made[1], law[0] - law[1], atol=0.01)


def test_the_exact_denoiser_gives_the_exact_law(exact: ImageGenerator, tmp_path: Path) -> None:
    given = cases(60)
    options: dict[str, Any] = dict(num_steps=20, sigma_min=0.02, sigma_max=40, sampler="dpmpp-2m")
    made = make_forecast(exact, given, tmp_path / "f.npz", steps=3, members=8, quiet=True, **options)
    assert made.truth is not None
    start, truth = (torch.from_numpy(x[:, :, 0]) for x in (given.start, made.truth))
    mean, std = TORUS.law(start, 3)
    off = made.members[:, :, :, 0] - mean[:, None].numpy()
    assert off.std(axis=(0, 1, 3, 4)) == pytest.approx(std.numpy(), rel=0.04)
    assert np.sqrt((off.mean(axis=1) ** 2).mean(axis=(0, 2, 3))) == pytest.approx(
        std.numpy() / np.sqrt(8), rel=0.06
    )
    scores = score_ensemble(made.members, made.truth, start=made.persistence)
    assert scores.crps_fair.value[:, 0] == pytest.approx(TORUS.law_score(start, truth), rel=0.04)
    assert scores.spread_skill.value == pytest.approx(1, abs=0.08)
    assert (scores.baselines["persistence"].skill.value > 0.4).all()


def test_what_is_written(exact: ImageGenerator, tmp_path: Path) -> None:
    given, out = cases(3, leads=2), tmp_path / "f.npz"
    made = make_forecast(exact, given, out, steps=3, members=2, seed=9, batch_size=4, quiet=True, **OPTIONS)
    assert made.members.shape == (3, 2, 3, 1, 16, 16)
    rows, members = np.arange(3).repeat(2), np.tile(np.arange(2), 3)
    want = roll_out(exact, given.start[rows], rows, members, steps=3, seed=9, **OPTIONS)
    np.testing.assert_allclose(made.members.reshape(6, 3, 1, 16, 16), want, atol=1e-5)
    assert made.truth is not None
    assert made.start is not None
    np.testing.assert_array_equal(made.truth[:, :2], given.truth)
    assert np.isnan(made.truth[:, 2]).all()
    np.testing.assert_array_equal(made.start, given.start)
    assert made.settings["seed"] == 9
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]
    before = out.stat().st_mtime_ns
    make_forecast(exact, given, out, steps=3, members=2, seed=9, batch_size=4, quiet=True, **OPTIONS)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"f\.npz holds a forecast of other settings \(seed 9 there, 8 here\)"
    ):
        make_forecast(exact, given, out, steps=3, members=2, seed=8, batch_size=4, quiet=True, **OPTIONS)


@pytest.mark.parametrize(
    ("kinds", "most"), [(("kill",), 4), pytest.param(KINDS, None, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_interruptions(
    exact: ImageGenerator, tmp_path: Path, kinds: tuple[str, ...], most: int | None
) -> None:
    given = cases(2)

    def work(root: Path) -> None:
        make_forecast(exact, given, root / "f.npz", steps=2, members=2, batch_size=2, quiet=True, **OPTIONS)

    assert check_every_interruption(tmp_path, work, kinds=kinds, most=most) > 6


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_cases_from_films_pairs_and_forecasts(tmp_path: Path) -> None:
    films = np.random.default_rng(0).standard_normal((4, 5, 2, 6, 8)).astype(np.float32)
    read: Callable[[Path], Cases] = lambda path: read_cases(path, frames=2, channels=2)  # noqa: E731
    found = read(write(tmp_path / "films.npz", frames=films))
    np.testing.assert_array_equal(found.start, films[:, :2])
    np.testing.assert_array_equal(found.truth, films[:, 2:])
    pairs = read(
        write(tmp_path / "pairs.npz", conditions=films[:, :2].reshape(4, 4, 6, 8), images=films[:, 2])
    )
    np.testing.assert_array_equal(pairs.start, films[:, :2])
    np.testing.assert_array_equal(pairs.truth, films[:, 2:3])
    np.save(tmp_path / "c.npy", films[:, :2].reshape(4, 4, 6, 8))
    np.testing.assert_array_equal(read(tmp_path / "c.npy").start, films[:, :2])
    assert read(tmp_path / "c.npy").truth is None
    forecast = read(write(tmp_path / "f.npz", members=films[:, None], start=films[:, :2], truth=films[:, 2:]))
    np.testing.assert_array_equal(forecast.truth, films[:, 2:])
    some = found.take(np.array([2]))
    np.testing.assert_array_equal(some.start[0], films[2, :2])


FILMS = np.zeros((4, 3, 1, 6, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": FILMS}, "it has none of the names"),
        ({"frames": FILMS, "start": FILMS}, "it holds frames and start: give one of them"),
        ({"conditions": FILMS[:, :, 0]}, r"conditions of shape \[4, 3, 6, 8\] must be \[N, 2, H, W\]: 2 frames of 1"),
        ({"frames": FILMS[:, :1]}, r"starts of shape \[4, 1, 1, 6, 8\] must be \[N, 2, 1, H, W\]"),
        ({"start": FILMS[:, :2], "truth": FILMS[:3]}, "truth of shape .* does not fit starts of shape"),
        ({"start": FILMS[:, :2], "vectors": np.zeros((3, 2, 1))}, "3 vectors for 4 starts: give one each"),
    ],
)  # fmt: skip
def test_files_that_hold_no_starts(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=f"does not hold starts of forecasts .*{message}"):
        read_cases(write(tmp_path / "x.npz", **arrays), frames=2, channels=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"members": 0}, "members 0 must be at least 1"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"out": Path("f.mp4")}, r"f.mp4 must end in \.npz, \.nc, \.zarr"),
        ({"cases": Cases(start=FILMS[:, :2])}, r"starts of shape .* must be \[N, 2, 1, 16, 16\] for this model"),
        ({"cases": dataclasses.replace(cases(2), vectors=np.zeros((2, 3, 1)))}, "none: this model takes no vectors"),
        ({"num_steps": 0}, "num_steps"),
    ],
)  # fmt: skip
def test_bad_input(exact: ImageGenerator, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(cases=cases(2), out=tmp_path / "f.npz", steps=2, members=2, quiet=True)
    given |= changes
    with pytest.raises(ValueError, match=message):
        make_forecast(exact, given.pop("cases"), given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_a_model_without_past_frames_is_refused(
    exact: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert past_frames(exact) == 2
    monkeypatch.setattr(exact.denoiser, "cond_channels", 0)
    with pytest.raises(ValueError, match="this model takes no condition: a forecast needs one"):
        past_frames(exact)
    monkeypatch.setattr(exact.denoiser, "cond_channels", 3)
    monkeypatch.setattr(exact.denoiser, "img_channels", 2)
    with pytest.raises(
        ValueError, match="from conditions of 3 x 16 x 16: a forecast needs conditions that are whole"
    ):
        past_frames(exact)


@pytest.mark.parametrize("known", [True, False])
def test_page(tmp_path: Path, known: bool) -> None:
    rng, channels = np.random.default_rng(0), 1 if known else 2
    made = Forecast(
        members=rng.standard_normal((3, 5, 2, channels, 6, 8)).astype(np.float32),
        truth=rng.standard_normal((3, 2, channels, 6, 8)) if known else None,
        start=rng.standard_normal((3, 2, channels, 6, 8)) if known else None,
    )
    made.members[0, 0, 0, 0, 0, 0] = np.nan
    scores = (
        score_ensemble(made.members, made.truth, start=made.persistence) if made.truth is not None else None
    )
    page = write_forecast_page(made, tmp_path / "p.html", scores=scores, title="T & T").read_text()
    assert page.count("<source") == 2 * channels  # two films of each
    assert ("Rank of the truth" in page) == known
    assert ("of channel 1" in page) != known
    assert ("step 0" in page) == known or "a known start" in page
    assert "T &amp; T" in page
    assert "<script" not in page
    single = dataclasses.replace(made, members=made.members[:, :1, :, :1], truth=None, start=None)
    assert "Film of the members" not in write_forecast_page(single, tmp_path / "q.html").read_text()
