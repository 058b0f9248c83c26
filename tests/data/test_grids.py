"""Fields in zarr groups and NetCDF files, as images, conditions and vectors."""

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.data import open_dataset, read_given
from edm2.extras import MissingExtra

xarray = pytest.importorskip("xarray")
zarr = pytest.importorskip("zarr")
# Without h5py, the older NetCDF3 is what can be tried.
ENGINE = "h5netcdf" if importlib.util.find_spec("h5py") else "scipy"

RNG = np.random.default_rng(0)
FINE = RNG.normal(280, 5, (6, 2, 8, 8)).astype(np.float32)
COARSE = RNG.normal(size=(6, 3, 4, 4)).astype(np.float32)
VECTORS = RNG.normal(size=(6, 2)).astype(np.float32)
CHOSEN = np.array([4, 1, 1])


def write_plain(path: Path, version: int) -> None:
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    for name, values in (("output_images", FINE), ("input_images", COARSE), ("vectors", VECTORS)):
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(2, *values.shape[1:])
        )
        array[:] = values


def write_named(path: Path) -> None:
    content = xarray.Dataset(
        {
            "output_images": (("case", "channel", "y", "x"), FINE),
            "input_images": (("case", "band", "lat", "lon"), COARSE),
            "vectors": (("case", "entry"), VECTORS),
            "t2m": (("case", "y", "x"), FINE[:, 0]),
            "u10": (("case", "y", "x"), FINE[:, 1]),
        }
    )
    if path.suffix == ".zarr":
        content.to_zarr(path, consolidated=False)
    else:
        content.to_netcdf(path, engine=ENGINE)


@pytest.fixture(params=["plain2.zarr", "plain3.zarr", "named.zarr", "named.nc"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    if path.stem.startswith("plain"):
        write_plain(path, int(path.stem[-1]))
    else:
        write_named(path)
    return path


def test_a_file_of_fields_is_a_data_set_of_pairs(file: Path) -> None:
    data = open_dataset(file, verify=True)
    assert data.conditions is not None
    assert np.array_equal(data.images(CHOSEN), FINE[CHOSEN])
    assert np.array_equal(data.conditions.images(CHOSEN), COARSE[CHOSEN])
    assert np.array_equal(data.vectors(CHOSEN), VECTORS[CHOSEN])
    assert open_dataset(file).fingerprint == data.fingerprint
    given = read_given(file)
    assert np.array_equal(given.conditions, COARSE)
    assert given.vectors is not None


def test_arrays_of_own_names_make_channels(tmp_path: Path) -> None:
    for name in ("named.zarr", "named.nc"):
        write_named(tmp_path / name)
        data = open_dataset(f"{tmp_path}/{name}:t2m,u10", condition=f"{tmp_path}/{name}:input_images")
        assert data.conditions is not None
        assert np.array_equal(data.images(CHOSEN), FINE[CHOSEN])
        assert np.array_equal(data.conditions.images(CHOSEN), COARSE[CHOSEN])


def test_packed_values_are_unpacked_and_fill_values_are_missing(tmp_path: Path) -> None:
    field = FINE[:, 0].copy()
    field[0, 0, 0] = np.nan
    packed = {"images": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -9999}}
    xarray.Dataset({"images": (("case", "y", "x"), field)}).to_netcdf(
        tmp_path / "packed.nc", engine=ENGINE, encoding=packed
    )
    data = open_dataset(tmp_path / "packed.nc", missing=True)
    assert np.nanmax(np.abs(data.images(np.arange(6))[:, 0] - field)) < 0.006
    assert np.isnan(data.images(np.array([0]))[0, 0, 0, 0])
    with pytest.raises(
        ValueError, match=r"packed.nc:images holds values that are not finite .*--dataset.missing mask"
    ):
        open_dataset(tmp_path / "packed.nc").images(np.array([0]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("t2m,u11", r"has no array 'u11', but .*output_images \[6, 2, 8, 8\]"),
        ("t2m,input_images", r"the same N, H and W: t2m \[6, 8, 8\], input_images \[6, 3, 4, 4\]"),
        ("vectors", r"must be \[N, H, W\] or \[N, C, H, W\]"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: str, message: str, tmp_path: Path) -> None:
    write_named(tmp_path / "named.nc")
    with pytest.raises(ValueError, match=message):
        open_dataset(f"{tmp_path}/named.nc:{names}")


def test_files_without_images_or_that_are_damaged_are_refused(tmp_path: Path) -> None:
    xarray.Dataset({"t2m": (("case", "y", "x"), FINE[:, 0])}).to_netcdf(tmp_path / "own.nc", engine=ENGINE)
    with pytest.raises(
        ValueError, match=r"has no array output_images or images, but t2m .* as in .*own.nc:t2m"
    ):
        open_dataset(tmp_path / "own.nc")
    (tmp_path / "bad.nc").write_bytes(b"no such format")
    with pytest.raises((ValueError, MissingExtra), match=r"bad\.nc (cannot be read|needs)"):
        open_dataset(tmp_path / "bad.nc")
    (tmp_path / "bad.zarr").mkdir()
    with pytest.raises(ValueError, match=r"bad\.zarr cannot be read \(No group found"):
        open_dataset(tmp_path / "bad.zarr")


@pytest.mark.skipif(ENGINE != "h5netcdf", reason="needs h5py")
def test_a_damaged_file_leaves_nothing_that_complains_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    path = tmp_path / "named.nc"
    write_named(path)
    whole, refused = path.read_bytes(), 0
    for start in range(0, 1024, 64):
        path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
        try:
            open_dataset(path)
        except ValueError:
            refused += 1
    gc.collect()
    assert refused > 3
    assert not complaints


def test_a_zarr_group_that_would_unpickle_is_not_opened(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    import pickle

    write_plain(tmp_path / "x.zarr", 2)
    metadata = tmp_path / "x.zarr" / "output_images" / ".zarray"
    content = json.loads(metadata.read_text())
    metadata.write_text(
        json.dumps({**content, "compressor": None, "filters": [{"id": "pickle", "protocol": 5}]})
    )
    for chunk in metadata.parent.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"output_images/.zarray asks for unpickling, which can run code"):
        open_dataset(tmp_path / "x.zarr")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["images", "labels", "vectors"])
def test_chunks_that_cannot_be_unpacked_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w")
    for key, values in (("images", FINE), ("labels", np.arange(6)), ("vectors", VECTORS)):
        group.create_array(key, data=values)
    chunk = max((p for p in (path / name).rglob("*") if p.name != "zarr.json"), key=lambda p: p.is_file())
    chunk.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=rf"a.zarr:{name} cannot be read \(.*\): restore it from a copy"):
        open_dataset(str(path))


def test_a_header_that_promises_far_more_than_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w")
    group.create_array("images", data=FINE)
    group.create_array("labels", shape=(10**12,), dtype="int64", chunks=(1000,))
    with pytest.raises(
        ValueError, match=r"a.zarr:labels .*promises 8,000,000,000,000 bytes of values and stores"
    ):
        open_dataset(str(path))


def test_an_array_of_nothing_but_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.open_group(str(path), mode="w").create_array(
        "images", shape=(10**9, 1, 8, 8), dtype="uint8", chunks=(1, 1, 8, 8)
    )
    with pytest.raises(
        ValueError, match=r"a.zarr:images .*promises 64,000,000,000 bytes of values and stores"
    ):
        open_dataset(str(path))


def test_far_more_chunks_than_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.open_group(str(path), mode="w").create_array(
        "images", shape=(4000, 1, 2, 2), dtype="uint8", chunks=(1, 1, 1, 1)
    )
    with pytest.raises(ValueError, match=r"a.zarr:images .*promises 16,000 chunks and has \d files"):
        open_dataset(str(path))
