import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from edm2.metrics import (
    CallableFeatures,
    FeatureSet,
    FeatureStatistics,
    Reference,
    frechet_distance,
    kernel_distance,
    measure,
    precision_recall,
    score,
)
from edm2.metrics.measure import kept_rows
from edm2.metrics.tensor_file import to_metadata

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 1, 2, 2), dtype=np.uint8)
PIXELS = CallableFeatures(lambda x: x.flatten(1).float() / 255, name="pixels", num_features=4)


def in_batches(images, size):
    return (
        (np.arange(i, min(i + size, len(images))), images[i : i + size]) for i in range(0, len(images), size)
    )


def measured(images, rows=None):
    return measure(PIXELS, in_batches(images, 7), rows=np.arange(len(images)) if rows is None else rows)


def test_batches_make_no_difference():
    expected = PIXELS.features(IMAGES).numpy()
    for size in (1, 7, 100):
        found = measure(PIXELS, in_batches(IMAGES, size), rows=np.array([3, 4, 39]))
        assert np.allclose(found.statistics.cov, np.cov(expected.T), rtol=1e-10)
        assert np.array_equal(found.features, expected[[3, 4, 39]])
        assert found.features.dtype == np.float32
    assert measured(IMAGES, np.arange(0)).features is None


def test_kept_rows():
    assert np.array_equal(kept_rows(5, 5), np.arange(5))
    rows = kept_rows(1000, 100)
    assert len(set(rows)) == 100
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(rows, kept_rows(1000, 100))
    assert not np.array_equal(rows, kept_rows(1000, 100, seed=1))
    # Every class of images whose class is the seed modulo 10 is there.
    assert len(set(rows % 10)) == 10


def test_scores_are_the_single_functions():
    a, b = measured(IMAGES[:25]), measured(IMAGES[25:])
    with pytest.warns(UserWarning, match="subsets of the kernel distance have 15 images each, all there are"):
        scores = score(a, b)
    assert scores.frechet == frechet_distance(a.statistics, b.statistics)
    assert scores.kernel == kernel_distance(b.features, a.features, subset_size=15)
    assert scores.manifold == precision_recall(b.features, a.features)
    only_moments = score(a, FeatureSet(statistics=b.statistics, features=None))
    assert only_moments.frechet == scores.frechet
    assert only_moments.kernel is only_moments.manifold is only_moments.support is None


@pytest.mark.parametrize("with_features", [True, False])
def test_a_reference_comes_back(tmp_path, with_features):
    made = measured(IMAGES, None if with_features else np.arange(0))
    Reference(**vars(made), provenance={"extractor": {"name": "pixels"}}).save(tmp_path / "r")
    read = Reference.load(tmp_path / "r")
    assert read.provenance == {"extractor": {"name": "pixels"}}
    assert len(read.sha256) == 64
    assert read.statistics.num_images == 40
    assert np.array_equal(read.statistics.mean, made.statistics.mean)
    assert np.allclose(read.statistics.cov, made.statistics.cov, rtol=1e-14)
    if with_features:
        assert np.array_equal(read.features, made.features)
    else:
        assert read.features is None


def test_the_same_reference_is_the_same_bytes(tmp_path):
    reference = Reference(**vars(measured(IMAGES)), provenance={"b": 1, "a": {"d": 2, "c": 3}})
    for i in range(8):  # the keys of a hash table come in a new order each time
        reference.save(tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1


def test_reference_errors(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"there is no reference file .*make one with `edm2 metrics ref DATA --out .*none\.safetensors",
    ):
        Reference.load(tmp_path / "none.npz")
    path = tmp_path / "r"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="is not a reference file of edm2"):
        Reference.load(path)
    moments = {"mu": np.zeros(2), "sigma": np.eye(2)}
    known = {"num_images": 5, "provenance": {}}
    with_features = {**moments, "features": np.full((4, 2), np.nan)}
    for arrays, header, message in [
        (moments, None, "its format is None, not 'edm2 reference 2'"),
        ({"mu": np.zeros(2)}, known, "'sigma'"),
        (with_features, known, "features hold values that are not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, known, r"mean \[3\] and cov \[2, 2\]"),
        ({**moments, "features": np.zeros((4, 3))}, known, r"features \[4, 3\] do not fit a mean of 2"),
        (moments, {**known, "num_images": 1}, "num_images 1 must be at least 2"),
        (moments, {**known, "num_images": []}, r"is not a reference file of edm2 .*int\(\)"),
        (moments, {**known, "provenance": []}, "its provenance is not a table"),
    ]:
        save_file(arrays, path, None if header is None else to_metadata("edm2 reference 2", header))
        with pytest.raises(ValueError, match=message):
            Reference.load(path)
    halves = {"mu": torch.zeros(2).bfloat16(), "sigma": torch.eye(2).bfloat16()}
    safetensors.torch.save_file(halves, path, to_metadata("edm2 reference 2", known))
    with pytest.raises(ValueError, match=r"is not a reference file of edm2 .*bfloat16.*make one"):
        Reference.load(path)
    with pytest.raises(ValueError, match="a mean needs at least 1 image"):
        Reference(statistics=FeatureStatistics(3), features=None).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_features_that_are_not_finite_end_the_work():
    broken = CallableFeatures(lambda x: torch.full((len(x), 2), torch.nan), name="broken", num_features=2)
    with pytest.raises(ValueError, match="features hold values that are not finite"):
        measure(broken, in_batches(IMAGES, 10), rows=np.arange(3))
