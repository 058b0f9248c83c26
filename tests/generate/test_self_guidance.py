"""A conditional model guided by itself without labels: from Python, the command line, and after a search."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.cli import main
from edm2.diffusion import WithoutLabels
from edm2.generate import ImageGenerator
from edm2.presets import get_preset
from edm2.train import DataConfig, NetworkConfig, train
from edm2.tuning import Knobs, TuningPlan, open_guide, save_tuned, tune

OPTIONS: dict[str, Any] = {"guidance": 2.0, "num_steps": 4, "sampler": "dpmpp-2m"}
WORDS = ["--num-steps", "4", "--sampler", "dpmpp-2m", "--device", "cpu", "--grid", "0"]


def trained(out: Path, **changes: Any) -> Path:
    network = NetworkConfig(
        model_channels=8, channel_mult=(1,), attn_resolutions=(), num_blocks=1, channels_per_head=8
    )
    config = dataclasses.replace(
        get_preset("digits"), num_images=160, batch_size=8, snapshot_images=80, network=network, **changes
    )
    train(config, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("self") / "run", label_dropout=0.2)


def test_the_command_line_does_what_the_guide_without_labels_does(run: Path, tmp_path: Path) -> None:
    model = ImageGenerator.load(run)
    label_free = WithoutLabels(model.denoiser, 10)
    expected = model.images(range(6), guide=label_free, **OPTIONS)
    assert np.array_equal(model.images(range(6), guide=model.without_labels(), **OPTIONS), expected)
    assert not np.array_equal(model.images(range(6), num_steps=4, sampler="dpmpp-2m"), expected)
    words = ["--guide", "self", "--guidance", "2", "--seeds", "0-5", *WORDS]
    main(["sample", str(run), "--out", str(tmp_path / "a.npz"), *words])
    found = np.load(tmp_path / "a.npz")["arr_0"]
    assert np.array_equal(found.reshape(expected.shape), expected)
    # The guide has an EMA length of its own if one is given.
    other = ImageGenerator.load(run, 0.05).without_labels()
    main(["sample", str(run), "--out", str(tmp_path / "b.npz"), *words, "--guide-ema", "0.05"])
    found = np.load(tmp_path / "b.npz")["arr_0"]
    assert np.array_equal(found.reshape(expected.shape), model.images(range(6), guide=other, **OPTIONS))


def test_images_do_not_depend_on_the_batch(run: Path) -> None:
    model = ImageGenerator.load(run)
    one_by_one = np.concatenate(
        [model.images([s], guide=model.without_labels(), **OPTIONS) for s in range(4)]
    )
    together = model.images(range(4), guide=model.without_labels(), **OPTIONS)
    assert np.abs(one_by_one.astype(int) - together).max() <= 1


def test_a_model_that_never_missed_its_labels_is_warned_about(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="not trained with missing labels"):
        ImageGenerator.load(plain).without_labels()
    free = trained(tmp_path / "free", dataset=DataConfig(labels=False))
    with pytest.raises(ValueError, match="an unconditional model cannot guide itself"):
        open_guide(free, Path("self"))


class Likeness:
    """Distance to images that certain settings give."""

    fingerprint = metric = "likeness"
    features = "pixels"

    def __init__(self, run: Path) -> None:
        model, guide = ImageGenerator.load(run, 0.05), ImageGenerator.load(run, 0.05).without_labels()
        starts = (3_000_000, 4_000_000, 4_000_008)
        self.wanted = [model.images(range(s, s + 8), guide=guide, **OPTIONS) for s in starts]

    def distance(self, images: np.ndarray) -> float:
        return min(float(np.abs(images.astype(float) - w).mean()) for w in self.wanted)


def test_a_search_finds_it_and_the_run_is_sampled_with_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = TuningPlan(
        sigma_rels=(0.05, 0.1), guide_moments=(), guide_factors=(1.0,), guide=Path("self"), guidances=(2.0,),
        highs=(), lows=(), samples=8, final_samples=8, repeats=2, num_steps=4, sampler="dpmpp-2m",
    )  # fmt: skip
    score = Likeness(run)
    found = tune(run, score, plan)
    best = Knobs(sigma_rel=0.05, guide="self", guide_images=160, guide_sigma_rel=0.05, guidance=2.0)
    assert found.best == best
    assert "guide self without labels with EMA 0.05, weight 2" in best.describe()
    save_tuned(run, found)
    main(["sample", str(run), "--seeds", "3000000-3000007", "--out", str(tmp_path / "a.npz"), *WORDS[-4:]])
    assert "guide self without labels" in capsys.readouterr().err
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert np.array_equal(images.reshape(score.wanted[0].shape), score.wanted[0])
