"""Reference statistics: what the official files hold, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.interop import reference
from edm2.interop.nvlabs import read_reference_statistics
from edm2.metrics import FeatureStatistics, frechet_distance


@pytest.fixture
def moments() -> dict[str, Any]:
    features = np.random.default_rng(0).standard_normal((50, 6))
    return {"mu": features.mean(0), "sigma": np.cov(features.T)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_statistics_come_back_exactly(tmp_path: Path, moments: dict[str, Any], protocol: int) -> None:
    half = {"mu": moments["mu"].astype(">f4"), "sigma": np.asfortranarray(moments["sigma"])}
    content = {"fid": moments, "fd_dinov2": half, "num_images": 50}
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    found = read_reference_statistics(path)
    assert list(found) == ["fid", "fd_dinov2"]
    for metric, expected in (("fid", moments), ("fd_dinov2", half)):
        assert np.array_equal(found[metric].mean, expected["mu"])
        assert np.array_equal(found[metric].cov, expected["sigma"])
        assert found[metric].mean.dtype == np.float64
    statistics = found["fid"].to_features()
    assert statistics.num_images == 50
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_number_of_images_may_be_a_numpy_scalar_or_missing(tmp_path: Path, moments: dict[str, Any]) -> None:
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps({"fid": moments, "num_images": np.int64(50)}))
    assert read_reference_statistics(path)["fid"].num_images == 50
    path.write_bytes(pickle.dumps({"fid": moments}))
    found = read_reference_statistics(path)["fid"]
    assert found.num_images is None
    assert isinstance(found.to_features(num_images=50), FeatureStatistics)
    with pytest.raises(ValueError, match="does not say how many images it is of: give num_images"):
        found.to_features()


def test_arrays_hold_fid_only(tmp_path: Path, moments: dict[str, Any]) -> None:
    np.savez(tmp_path / "stats.npz", **moments)
    found = read_reference_statistics(tmp_path / "stats.npz")
    assert list(found) == ["fid"]
    assert np.array_equal(found["fid"].cov, moments["sigma"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mu": None}, "no mu of fid with 1 dimension"),
        ({"mu": np.zeros((6, 1))}, "no mu of fid with 1 dimension"),
        ({"mu": np.array([1j] * 6)}, "an array of type 'c16'; only numbers are read"),
        ({"mu": np.array([None] * 6)}, "an array of type 'O8'; only numbers are read"),
        ({"mu": np.zeros(6, [("a", "f4")])}, "an array of type 'V4'; only numbers are read"),
        ({"mu": np.zeros(5)}, "a mu and sigma of fid that do not fit each other"),
        (
            {"sigma": np.full((6, 6), np.nan)},
            "a mu and sigma of fid that do not fit each other, or are not finite",
        ),
    ],
)
def test_other_content_is_refused(
    tmp_path: Path, moments: dict[str, Any], change: dict[str, Any], what: str
) -> None:
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps({"fid": {**moments, **change}, "num_images": 50}))
    with pytest.raises(ValueError, match=f"stats.pkl was not read: it holds {what}.*Nothing in it was run"):
        read_reference_statistics(path)


def test_other_structure_is_refused(tmp_path: Path, moments: dict[str, Any]) -> None:
    path = tmp_path / "stats.pkl"
    for content, what in (
        ([1], "no reference statistics by name of a metric"),
        ({"num_images": 3}, "no reference statistics by name of a metric"),
        ({3: moments}, "no reference statistics by name of a metric"),
        ({"fid": moments, "num_images": "50"}, "a num_images that is not a number of images"),
        (dict.fromkeys(map("m{}".format, range(9)), moments), "no reference statistics by name of a metric"),
        ({"fid": moments, "num_images": 1}, "a num_images that is not a number of images"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=what):
            read_reference_statistics(path)


def test_hostile_archives_are_refused(
    tmp_path: Path, moments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"is not a file: give the \.npz file itself"):
        read_reference_statistics(path)
    np.savez(path, mu=np.array([{}]), sigma=moments["sigma"])
    with pytest.raises(ValueError, match="it holds no whole archive of numbers"):
        read_reference_statistics(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="it holds no whole archive of numbers"):
        read_reference_statistics(path)
    np.savez_compressed(path, mu=np.zeros(10_000), sigma=moments["sigma"])
    monkeypatch.setattr(reference, "_MOST_NUMBERS", 9_999)
    with pytest.raises(ValueError, match="a mu of fid with 10000 numbers, more than any features have"):
        read_reference_statistics(path)
    monkeypatch.setattr(reference, "_LARGEST_NPZ", 80_000)
    with pytest.raises(ValueError, match="more than 80000 bytes once unpacked"):
        read_reference_statistics(path)
