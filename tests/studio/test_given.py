"""Runs that are given more than a class, and runs that make no pixels: conditions, members, floats, latents."""

import shlex

import numpy as np
import pytest

from edm2.cli import main
from edm2.data import open_dataset
from edm2.generate import read_images
from edm2.studio.choices import Choice
from edm2.studio.workbench import Workbench


def choice(bench, **changes):
    return Choice(**{"sigma_rel": 0.1, "num_images": bench.times[-1], "num_steps": 3, "count": 4, **changes})


SIZE = 64


def made_by_command(bench, chosen, out):
    words = shlex.split(bench.command(chosen))
    main([*words[1:-1], str(out)])
    if out.suffix == ".npz":
        with np.load(out) as archive:
            return archive["arr_0"]
    return read_images([out / f"{seed:06d}.png" for seed in chosen.seeds])


@pytest.mark.parametrize(
    "changes", [{"case": 3}, {"case": 3, "label": 7}, {"case": 5, "first_seed": 40, "count": 1}]
)
def test_members_of_a_case_are_those_of_the_command(pixels, changes, tmp_path):
    bench = Workbench(pixels)
    chosen = choice(bench, **changes)
    images = bench.images(chosen)
    assert np.array_equal(made_by_command(bench, chosen, tmp_path / "made"), images)
    assert f"--conditions {pixels}/studio/given/case-{chosen.case}" in bench.command(chosen)
    assert bench.command(chosen, may_write=False).startswith("A command needs a file")
    assert len(bench.path(chosen)) == 3


def test_cases_are_the_held_out_ones(pixels):
    bench = Workbench(pixels)
    assert (len(bench.cases), bench.cases.kind) == (SIZE // 4, "held-out")
    images = bench.images(choice(bench, case=2))
    named = dict(bench.given(choice(bench, case=2), images))
    assert [name.split(",")[0] for name in named] == ["given", "mean", "spread", "truth"]
    truth = named["truth"][0]
    assert np.array_equal(named["given"][0, 0], truth[0][:, :4])
    assert any(np.array_equal(truth[0], image[0]) for image in open_dataset("digits").images(np.arange(SIZE)))
    assert np.array_equal(named["mean"], images.mean(0, keepdims=True).astype(np.uint8))
    assert np.abs(images[0].astype(int) - bench.images(choice(bench, case=9))[0]).max() > 0
    with pytest.raises(ValueError, match="case 16 does not exist: choose one from 0 to 15"):
        bench.images(choice(bench, case=16))


def test_a_dropped_picture_takes_the_place_of_the_condition(pixels, tmp_path):
    bench = Workbench(pixels)
    assert bench.cases.takes_pictures
    picture = np.zeros((80, 60, 3), np.uint8)
    picture[:, :30] = 200
    name = bench.cases.drop(picture)
    assert bench.cases.drop(picture) == name
    chosen = choice(bench, dropped=name)
    given = bench.cases.given(chosen, 2)["conditions"]
    assert given.shape == (2, 1, 8, 4)
    assert given[0, 0, 4, 0] > 150 > 50 > given[0, 0, 4, 3]
    images = bench.images(chosen)
    assert len(bench.given(chosen, images)) == 3  # nobody knows the truth
    assert np.array_equal(made_by_command(bench, chosen, tmp_path / "made"), images)
    with pytest.raises(ValueError, match="the picture is no longer in memory: drop it again"):
        bench.images(choice(bench, dropped="another"))


def test_floats_are_shown_in_colours(floats, tmp_path):
    bench = Workbench(floats)
    assert not bench.cases.takes_pictures
    chosen = choice(bench, case=7)
    images = bench.images(chosen)
    assert (images.dtype, images.shape) == (np.float32, (4, 2, 8, 8))
    assert bench.picture(images).shape == (4, 3, 8, 16)
    assert bench.picture(images).dtype == np.uint8
    assert all(picture.dtype == np.uint8 for _, picture in bench.given(chosen, images))
    made = made_by_command(bench, chosen, tmp_path / "made.npz")
    assert np.array_equal(made, images)
    assert bench.noise(chosen) is not None


def test_a_run_whose_data_is_gone(floats):
    data = floats.parent / "pairs.npz"
    data.rename(floats.parent / "away.npz")
    try:
        with pytest.raises(ValueError, match="the studio takes conditions from the data of"):
            Workbench(floats)
    finally:
        (floats.parent / "away.npz").rename(data)


def test_an_autoencoder_is_for_latents(pixels):
    with pytest.raises(ValueError, match=r"--vae is for latent models, and .* makes pixels: leave it out"):
        Workbench(pixels, vae="x")
