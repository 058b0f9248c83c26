import numpy as np
import pytest
import torch

from edm2.metrics import FeatureStatistics, frechet_distance

RNG = np.random.default_rng(0)


def statistics(*batches):
    result = FeatureStatistics()
    for batch in batches:
        result.update(batch)
    return result


def gaussian(mean, cov):
    return FeatureStatistics.from_moments(np.asarray(mean, float), np.asarray(cov, float), num_images=1000)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 0, 200, 93]])
def test_streaming_equals_numpy(sizes):
    features = RNG.normal(size=(300, 6)) * [1, 2, 3, 1e-3, 5, 1] + 100
    result = statistics(*np.split(features, np.cumsum(sizes)[:-1]))
    assert result.num_images == 300
    assert np.allclose(result.mean, features.mean(0), rtol=1e-13)
    assert np.allclose(result.cov, np.cov(features.T), rtol=1e-9, atol=1e-12)


def test_merging_equals_one_stream_and_leaves_the_other_alone():
    a, b = RNG.normal(size=(40, 4)), RNG.normal(size=(7, 4)) + 3
    whole, left, right = statistics(a, b), statistics(a), statistics(b)
    before = right.cov
    left.merge(right)
    left.merge(FeatureStatistics())
    assert np.allclose(left.cov, whole.cov, rtol=1e-12)
    assert np.allclose(left.mean, whole.mean, rtol=1e-12)
    left.update(a)
    assert np.array_equal(right.cov, before)
    empty = FeatureStatistics()
    empty.merge(right)
    empty.update(a)
    assert np.array_equal(right.cov, before)


def test_a_large_offset_does_not_cancel():
    # In float32, or by sums of squares, the covariance would be lost.
    features = RNG.normal(size=(1000, 2)) + 1e7
    assert np.allclose(statistics(*np.split(features, 10)).cov, np.cov(features.T), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_are_taken_in_any_precision(dtype):
    features = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 8.0]], dtype=dtype, requires_grad=True)
    expected = np.cov(features.detach().double().numpy().T)
    assert np.allclose(statistics(features).cov, expected, rtol=1e-14)


def test_moments_come_back():
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    result = FeatureStatistics.from_moments(np.array([1.0, -1.0]), cov, num_images=5)
    assert np.allclose(result.cov, cov)
    assert result.mean.tolist() == [1, -1]
    assert result.num_images == 5


def test_one_dimension():
    # |m1 - m2|^2 + (s1 - s2)^2
    assert frechet_distance(gaussian([1], [[4]]), gaussian([4], [[25]])) == pytest.approx(9 + 9, rel=1e-12)


@pytest.mark.parametrize("size", [2, 10, 100])
def test_commuting_covariances(size):
    u = rotation(size)
    p, q = RNG.uniform(0, 3, (2, size))
    shift = RNG.normal(size=size)
    a, b = gaussian(np.zeros(size), u * p**2 @ u.T), gaussian(shift, u * q**2 @ u.T)
    expected = np.square(shift).sum() + np.square(p - q).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_are_exact():
    # Ranks 3 and 4 of 50, sharing two directions.
    u = rotation(50)
    p, q = np.zeros(50), np.zeros(50)
    p[:3], q[1:5] = [1, 2, 3], [2.5, 1, 4, 5]
    a, b = gaussian(np.zeros(50), u * p**2 @ u.T), gaussian(np.zeros(50), u * q**2 @ u.T)
    assert frechet_distance(a, b) == pytest.approx(np.square(p - q).sum(), rel=1e-12)


def test_orthogonal_supports_and_points():
    zero = gaussian([0, 0], np.zeros((2, 2)))
    along_x, along_y = gaussian([0, 0], np.diag([4.0, 0])), gaussian([0, 0], np.diag([0, 9.0]))
    assert frechet_distance(along_x, along_y) == pytest.approx(13)
    assert frechet_distance(zero, along_y) == pytest.approx(9)
    assert frechet_distance(zero, gaussian([3, 4], np.zeros((2, 2)))) == pytest.approx(25)


@pytest.mark.parametrize("count", [5, 64, 500])
def test_a_set_has_no_distance_from_itself(count):
    features = RNG.normal(size=(count, 64)) * 10
    a, b = statistics(features), statistics(features[::-1])
    assert 0 <= frechet_distance(a, b) < 1e-12 * np.trace(a.cov)


def test_fewer_images_than_features_in_closed_form():
    # Two sets in one subspace of rank 7, the second a scaled copy: (1 - s)^2 tr S + (1 - s)^2 |m|^2.
    features = RNG.normal(size=(8, 100)) + 1
    a, b = statistics(features), statistics(3 * features)
    expected = 4 * (np.trace(a.cov) + np.square(a.mean).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_a_shift_and_a_scale():
    features = RNG.normal(size=(200, 5))
    a = statistics(features)
    assert frechet_distance(a, statistics(features + np.array([3, 0, 0, 4, 0]))) == pytest.approx(
        25, rel=1e-10
    )
    b = statistics(RNG.normal(size=(200, 5)) * 2)
    scaled = FeatureStatistics.from_moments(10 * a.mean, 100 * a.cov, num_images=200)
    larger = FeatureStatistics.from_moments(10 * b.mean, 100 * b.cov, num_images=200)
    assert frechet_distance(scaled, larger) == pytest.approx(100 * frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize("size", [3, 64, 300])
def test_equals_the_matrix_root_of_scipy(size):
    linalg = pytest.importorskip("scipy.linalg")
    mix = RNG.normal(size=(size, size)) * np.exp(-np.arange(size) / 20)
    a = statistics(RNG.normal(size=(2 * size, size)) @ mix)
    b = statistics(RNG.normal(size=(2 * size, size)) @ mix * 1.1 + 0.2)
    root = np.trace(linalg.sqrtm(a.cov @ b.cov).real)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def torch_fidelity(a, b):
    """What torch-fidelity 0.4.0 computes of given moments: the root by eigenvalues of the product."""
    diff = a.mean - b.mean
    root_trace = np.sqrt(np.linalg.eigvals(a.cov @ b.cov).astype(complex)).real.sum()
    return diff.dot(diff) + np.trace(a.cov) + np.trace(b.cov) - 2 * root_trace


@pytest.mark.parametrize(("count", "size"), [(2000, 64), (5000, 300), (100, 128)])
def test_equals_the_arithmetic_of_torch_fidelity(count, size):
    features = RNG.gamma(0.5, size=(count, size)) @ RNG.normal(size=(size, size)) / size**0.5
    others = 1.05 * features[: count // 2] + 0.1 * RNG.normal(size=(count // 2, size)) + 0.02
    a, b = statistics(features), statistics(others)
    assert frechet_distance(a, b) == pytest.approx(torch_fidelity(a, b), rel=1e-6)


@pytest.mark.parametrize("decay", [2, 8])
def test_ill_conditioned_features(decay):
    # Scales from 1 down to e^-16 or e^-64: the last eigenvalues of the covariance are rounding beside the first.
    scales = np.exp(-decay * np.arange(64) / 8)
    features = (RNG.normal(size=(400, 64)) * scales) @ rotation(64) + 50
    a, b = statistics(features), statistics(1.2 * features[::-1] + 0.1)
    expected = 0.04 * np.trace(a.cov) + np.square(b.mean - a.mean).sum()  # the second is the first, scaled
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    others = statistics((RNG.normal(size=(300, 64)) * scales) @ rotation(64, seed=1) + 50)
    assert frechet_distance(a, others) == pytest.approx(torch_fidelity(a, others), rel=1e-6)


def test_covariances_stored_in_float32_are_taken():
    features = RNG.normal(size=(40, 100)) @ np.diag(np.exp(-np.arange(100) / 5))
    stored = np.cov(features.T).astype(np.float32)
    assert np.linalg.eigvalsh(stored.astype(float))[0] < 0
    again = FeatureStatistics.from_moments(features.mean(0), stored, num_images=40)
    assert frechet_distance(again, statistics(features)) < 1e-5


def test_errors_of_statistics():
    with pytest.raises(ValueError, match=r"features must have the shape \[N, D\], not \[3\]"):
        statistics(np.zeros(3))
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        statistics(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"not finite, or beyond 1e\+40: look at the images"):
        statistics(np.array([[1e200, 0.0], [0.0, 1.0]]))  # its square would overflow, far from here
    with pytest.raises(ValueError, match="cannot mix 2 and 3 features: use one extractor"):
        statistics(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="cannot mix 5 and 3 features"):
        FeatureStatistics(5).update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="a mean needs at least 1 image"):
        _ = FeatureStatistics(3).mean
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, and there are 1"):
        _ = statistics(np.zeros((1, 3))).cov


@pytest.mark.parametrize(
    ("mean", "cov", "num_images", "message"),
    [
        (np.zeros(2), np.zeros((3, 3)), 5, r"mean \[2\] and cov \[3, 3\] must be"),
        (np.zeros(2), np.eye(2), 1, "num_images 1 must be at least 2"),
        (np.zeros(2), np.full((2, 2), np.inf), 5, "must be finite"),
        (np.zeros(2), np.array([[1.0, 2.0], [0.0, 1.0]]), 5, "cov must be symmetric"),
        (
            np.zeros(2),
            np.array([[1.0, 2.0], [2.0, 1.0]]),
            5,
            "eigenvalue -1 next to 3: a covariance has no negative",
        ),
        (np.zeros(2), -np.eye(2), 5, "eigenvalue -1 next to -1: a covariance has no negative"),
        (np.full(2, 1e200), np.eye(2), 5, r"finite, of at most 1e\+40"),
    ],
)
def test_errors_of_moments(mean, cov, num_images, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_moments(mean, cov, num_images=num_images)


def test_errors_of_the_distance():
    with pytest.raises(ValueError, match="cannot compare 2 with 3 features"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))
    with pytest.raises(ValueError, match="a covariance needs at least 2 images"):
        frechet_distance(gaussian([0, 0], np.eye(2)), statistics(np.zeros((1, 2))))
