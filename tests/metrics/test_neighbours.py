import numpy as np
import pytest

from edm2.metrics import nearest_distances

RNG = np.random.default_rng(0)
REFERENCES = RNG.integers(0, 256, (50, 3, 4, 5), dtype=np.uint8)


@pytest.mark.parametrize("block", [1, 7, 512])
def test_equals_the_plain_definition(block):
    queries = RNG.integers(0, 256, (23, 3, 4, 5), dtype=np.uint8)
    difference = (queries[:, None] / 255.0 - REFERENCES / 255.0).reshape(23, 50, -1)
    expected = np.sqrt(np.square(difference).mean(axis=2))
    nearest = nearest_distances(queries, REFERENCES, block=block)
    assert np.array_equal(nearest.indices, expected.argmin(axis=1))
    assert np.allclose(nearest.distance, expected.min(axis=1), rtol=1e-12)


def test_copies_have_distance_zero_exactly():
    order = RNG.permutation(50)
    distance, indices = nearest_distances(REFERENCES[order], REFERENCES)
    assert np.array_equal(indices, order)
    assert np.array_equal(distance, np.zeros(50))


def test_black_and_white_are_one_apart():
    black, white = np.zeros((1, 1, 8, 8), np.uint8), np.full((1, 1, 8, 8), 255, np.uint8)
    assert nearest_distances(black, white).distance == 1
    one_step = white.copy()
    one_step[0, 0, 0, 0] -= 51
    assert nearest_distances(one_step, white).distance == pytest.approx(0.2 / 8, rel=1e-14)


def test_no_queries():
    distance, indices = nearest_distances(REFERENCES[:0], REFERENCES)
    assert distance.shape == indices.shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="queries must be uint8 images, not float64"):
        nearest_distances(REFERENCES / 255, REFERENCES)
    with pytest.raises(ValueError, match="references must be uint8 images"):
        nearest_distances(REFERENCES, REFERENCES / 255)
    with pytest.raises(ValueError, match=r"queries \[3, 4\] and references \[3, 4, 5\] differ in shape"):
        nearest_distances(REFERENCES[..., 0], REFERENCES)
    with pytest.raises(ValueError, match="there are no references"):
        nearest_distances(REFERENCES, REFERENCES[:0])
