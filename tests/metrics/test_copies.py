"""Signs of copying, where they can be counted by hand."""

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from edm2.metrics import check_copies, nearest_distances
from edm2.metrics.copies import rank_z_score


def gray(*values: int) -> np.ndarray:
    """Images of one pixel: distances are differences over 255."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4)).astype(np.uint8)


def test_a_copied_set_is_found_entirely():
    training = noise(300, 0)
    for held_out in (noise(200, 1), None):
        check = check_copies(training[:100], training, held_out)
        assert (check.suspects, check.authentic, check.median) == (1.0, 0.0, 0.0)
        n, m = 100, 300 if held_out is None else 200
        lowest = -(n * m / 2) / math.sqrt(
            n * m * (n + m + 1) / 12
        )  # with every sample nearer than every other image
        assert check.c_t == pytest.approx(lowest, rel=0.03)  # a little lower by ties among the copies
        assert check.is_copying
        assert check.verdict.startswith(
            "the model copies its training images: 100% of the samples are nearer"
        )
        assert list(check.nearest.indices) == list(range(100))


def test_new_images_of_the_same_kind_are_not_suspected():
    check = check_copies(noise(2000, 2), noise(300, 0), noise(2000, 1))
    assert check.suspects == pytest.approx(0.01, abs=0.007)
    assert abs(check.c_t) < 3
    # One of the two gaps is the shorter by chance; in many dimensions the nearest training image is often a hub.
    assert 0.3 < check.authentic < 0.9
    assert not check.is_copying
    assert (
        check.verdict
        == "no sign of copying: 1% of the samples are nearer to a training image than 99% of "
        + ("held-out images are (1% is expected)")
    )


def test_training_images_stand_for_held_out_ones():
    with_held_out = check_copies(noise(500, 2), noise(400, 0), noise(400, 1))
    without = check_copies(noise(500, 2), noise(400, 0))
    assert without.left_out
    assert "than 99% of the training images are to each other" in without.verdict
    assert without.median_held_out == pytest.approx(with_held_out.median_held_out, rel=0.05)


def test_some_copies_among_new_images_are_found():
    training = noise(300, 0)
    check = check_copies(np.concatenate([training[:50], noise(150, 2)]), training, noise(300, 1))
    assert check.suspects == pytest.approx(0.25, abs=0.02)
    assert check.is_copying


def test_authenticity_by_hand():
    # 3 is nearer to 0 than 0 to 10; 40 is further from 20 than 20 from 10; 15 lies between, at half of that.
    check = check_copies(gray(3, 40, 15), gray(0, 10, 20), gray(100))
    assert check.authentic == pytest.approx(1 / 3)
    assert check.median == pytest.approx(5 / 255)
    assert check.median_held_out == pytest.approx(80 / 255)


def test_z_score_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, 40).astype(float), rng.integers(3, 25, 70).astype(float)
    p = mannwhitneyu(a, b, use_continuity=False, method="asymptotic", alternative="less").pvalue
    assert 0.5 * math.erfc(-rank_z_score(a, b) / math.sqrt(2)) == pytest.approx(p, rel=1e-9)
    assert rank_z_score(a, b) == pytest.approx(-rank_z_score(b, a))
    assert rank_z_score(np.ones(3), np.ones(4)) == 0


def test_an_image_is_not_its_own_nearest():
    found = nearest_distances(gray(0, 10, 30), gray(0, 10, 30), skip=np.arange(3))
    assert list(found.indices) == [1, 0, 1]
    assert found.distance * 255 == pytest.approx([10, 10, 20])


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ((gray(), gray(1, 2)), "samples: 0 images are too few to look for copies, at least 1 needed"),
        ((gray(1), gray(1)), "training: 1 images are too few"),
        ((gray(1), gray(1, 2), gray()), "held_out: 0 images are too few"),
    ],
)
def test_too_few_images(sets, told):
    with pytest.raises(ValueError, match=told):
        check_copies(*sets)
