import numpy as np
import pytest

from edm2.metrics import kernel_distance, squared_mmd

RNG = np.random.default_rng(0)


def plain(a, b):
    """The definition, pair by pair."""

    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = sum(
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    )
    return within - 2 * np.mean([[k(x, y) for y in b] for x in a])


@pytest.mark.parametrize("block", [1, 5, 2048])
def test_equals_the_definition(block):
    a, b = RNG.normal(size=(13, 4)).astype(np.float32), RNG.normal(size=(8, 4)) + 0.5
    assert squared_mmd(a, b, block=block) == pytest.approx(plain(a.astype(np.float64), b), rel=1e-12)


def test_two_points_in_closed_form():
    # All of a at 0, all of b at x: 1 + (x^2 + 1)^3 - 2.
    a, b = np.zeros((5, 1)), np.full((7, 1), 2.0)
    assert squared_mmd(a, b) == pytest.approx(1 + 125 - 2, rel=1e-14)


def test_is_unbiased_and_grows_with_a_shift():
    values = []
    for _ in range(400):
        a, b = RNG.normal(size=(2, 20, 3))
        values.append(squared_mmd(a, b))
    # A biased estimate would lie near 2 E[k(x, x) - k(x, y)] / 20, some 0.6 here.
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
    a = RNG.normal(size=(300, 3))
    assert squared_mmd(a, a + 1) > squared_mmd(a, a + 0.3) > abs(np.mean(values))


def test_subsets():
    a, b = RNG.normal(size=(60, 4)), RNG.normal(size=(50, 4)) + 0.3
    result = kernel_distance(a, b, subset_size=20, num_subsets=300)
    assert result.value == pytest.approx(squared_mmd(a, b), abs=5 * result.spread / np.sqrt(300))
    assert result.spread > 0
    assert kernel_distance(a, b, subset_size=20, num_subsets=300) == result
    assert kernel_distance(a, b, subset_size=20, num_subsets=300, seed=1) != result
    whole = kernel_distance(b, b + 1, subset_size=50, num_subsets=3)
    assert whole.value == pytest.approx(squared_mmd(b, b + 1), rel=1e-12)
    assert (whole.spread, whole.num_subsets) == (None, 1)  # not 0: nothing is known of other images
    assert kernel_distance(a, b, subset_size=50, num_subsets=3).spread > 0
    assert kernel_distance(a, b, subset_size=20, num_subsets=1).spread is None


def test_errors():
    a = np.zeros((5, 2))
    with pytest.raises(
        ValueError, match="subset_size 6 must be from 2 to the smaller set's number of images, 5"
    ):
        kernel_distance(a, a, subset_size=6)
    with pytest.raises(ValueError, match="5 and 1 images are too few"):
        squared_mmd(a, a[:1])
    with pytest.raises(ValueError, match=r"features must have the shape \[N, D\], not \[5\]"):
        squared_mmd(a, a[:, 0])
    with pytest.raises(ValueError, match="cannot compare 2 with 3 features: use one extractor"):
        squared_mmd(a, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        squared_mmd(a, np.full((5, 2), np.nan))
