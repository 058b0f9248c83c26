import numpy as np
import pytest

from edm2.metrics import density_coverage, precision_recall

RNG = np.random.default_rng(0)
# Whole numbers: squared distances, and ties between them, are exact.
REAL, MADE = RNG.integers(0, 6, (40, 3)).astype(np.float32), RNG.integers(1, 8, (31, 3)).astype(np.float32)


def distances(a, b):
    return np.square(a[:, None].astype(float) - b).sum(2)


def radii(features, k):
    return np.sort(distances(features, features) + np.diag([np.inf] * len(features)), axis=1)[:, k - 1]


@pytest.mark.parametrize("block", [1, 7, 2048])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_equals_the_definition(block, k):
    between = distances(REAL, MADE)
    in_real, in_made = between <= radii(REAL, k)[:, None], between <= radii(MADE, k)[None]
    precision, recall = precision_recall(REAL, MADE, k=k, block=block)
    assert (precision, recall) == (in_real.any(0).mean(), in_made.any(1).mean())
    density, coverage = density_coverage(REAL, MADE, k=k, block=block)
    assert density == pytest.approx(in_real.sum() / (k * 31), rel=1e-14)
    assert coverage == in_real.any(1).mean()


def test_on_a_line_by_hand():
    real, made = np.array([[0.0], [1], [2], [10]]), np.array([[1.5], [30], [17.5]])
    # Radii of real, k = 1: 1, 1, 1, 8; of made: 16, 12.5, 12.5.
    assert precision_recall(real, made, k=1) == (2 / 3, 4 / 4)
    # 1.5 lies in the balls of 1 and 2, not in that of 10 (8.5 away); 17.5 in that of 10.
    assert density_coverage(real, made, k=1) == (3 / 3, 3 / 4)


def test_a_set_beside_itself_and_far_away():
    features = RNG.normal(size=(50, 4))
    assert precision_recall(features, features) == (1, 1)
    density, coverage = density_coverage(features, features)
    # Each ball holds its centre and its 5 neighbours.
    assert density == pytest.approx(6 / 5)
    assert coverage == 1
    assert precision_recall(features, features + 100) == (0, 0)
    assert density_coverage(features, features + 100) == (0, 0)


def test_a_collapsed_generator_is_precise_and_not_varied():
    real = RNG.normal(size=(200, 2))
    made = real[:1] + 1e-6 * RNG.normal(size=(200, 2))
    assert precision_recall(real, made).precision == 1
    assert precision_recall(real, made).recall < 0.05
    assert density_coverage(real, made).coverage < 0.1


def test_errors():
    with pytest.raises(
        ValueError, match=r"k 3 must be from 1 to 2, one less than the number of images \(3\)"
    ):
        precision_recall(REAL, MADE[:3])
    with pytest.raises(ValueError, match="k 0 must be from 1 to 39"):
        density_coverage(REAL, MADE, k=0)
    with pytest.raises(ValueError, match="k 5 must be from 1 to 3"):
        density_coverage(REAL[:4], MADE)
    with pytest.raises(ValueError, match="cannot compare 3 with 2 features"):
        density_coverage(REAL, MADE[:, :2])
