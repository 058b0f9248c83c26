"""Forecasts on the disk: one `.npz`, NetCDF or zarr, with the same arrays under the same names."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.grids import check_fields, chunk_files, reading_fields
from edm2.data.npy import check_promise, read_arrays
from edm2.extras import MissingExtra, needed
from edm2.files import read_json, replacing, replacing_folder
from edm2.generate.archive import array_header, writing

FORMATS = (".npz", ".nc", ".zarr")
_SETTINGS = "settings.json"  # in an archive; an attribute elsewhere
_MOST_SETTINGS = 32 << 20
_MOST_NETCDF = (1 << 32) - 4  # bytes of an array in NetCDF 3, which every program reads
_DIMENSIONS = {
    "members": ("case", "member", "lead", "channel", "y", "x"),
    "truth": ("case", "lead", "channel", "y", "x"),
    "start": ("case", "frame", "channel", "y", "x"),
}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Members of a forecast, with truth and start if they are known, in the data's own units.

    Attributes:
        members: `[cases, members, leads, channels, height, width]`.
        truth: `[cases, leads, channels, height, width]`, NaN where it is missing; None if it is not known.
        start: `[cases, frames, channels, height, width]`, the frames that the forecast starts from, the latest last:
            that one for all leads is the reference "persistence".
        settings: What made it.
    """

    members: np.ndarray
    truth: np.ndarray | None = None
    start: np.ndarray | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def persistence(self) -> np.ndarray | None:
        """The last known frame, `[cases, channels, height, width]`."""
        return None if self.start is None else self.start[:, -1]


def check_format(path: Path) -> None:
    """Raise ValueError unless a forecast can be written under this name."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}, which says how the forecast is written")
    if path.suffix.lower() != ".npz":
        with needed(f"a {path.suffix.lower()} file", instead="; .npz needs nothing"):
            import xarray  # noqa: F401 - before hours of sampling

            if path.suffix.lower() == ".zarr":
                import zarr  # noqa: F401


def write_forecast(path: Path, forecast: Forecast) -> Path:
    """Write a forecast in the format of the name's ending; the file appears when it is complete.

    Equal forecasts are equal bytes as `.npz`, and equal values in all formats.

    Args:
        path: The file, or the folder for .zarr; an older one is replaced.
        forecast: Its arrays may be mapped from files: they are written part by part.

    Returns:
        The path.

    Raises:
        ValueError: If the name has another ending, or an array is too large for NetCDF.
        MissingExtra: If a package for the format is missing.
    """
    check_format(path)
    arrays = {name: getattr(forecast, name) for name in _DIMENSIONS if getattr(forecast, name) is not None}
    settings = json.dumps(forecast.settings, indent=1, sort_keys=True)
    if path.suffix.lower() == ".npz":
        with writing(path) as put:
            for name, array in arrays.items():
                header = array_header(array.dtype, array.shape)
                put(f"{name}.npy", (header, *(np.ascontiguousarray(row).tobytes() for row in array)))
            put(_SETTINGS, [settings.encode()])
        return path
    import xarray

    is_netcdf = path.suffix.lower() == ".nc"
    if is_netcdf:  # NetCDF 3 has no unsigned bytes
        arrays = {n: a.astype(np.int16) if a.dtype == np.uint8 else a for n, a in arrays.items()}
    content = xarray.Dataset(
        {name: (_DIMENSIONS[name], array) for name, array in arrays.items()},
        coords={"lead": np.arange(1, forecast.members.shape[2] + 1)},
        attrs={"settings": settings},
    )
    if is_netcdf:
        if max(array.nbytes for array in arrays.values()) > _MOST_NETCDF:
            raise ValueError(f"{path} would hold more than 4 GiB, the most of NetCDF 3: choose .zarr or .npz")
        with replacing(path) as file:
            content.to_netcdf(file.name, engine="scipy", format="NETCDF3_64BIT")
    else:
        with replacing_folder(path) as folder:
            content.to_zarr(folder, mode="a", consolidated=False)  # "w" would replace the folder itself
    return path


def read_forecast(path: Path) -> Forecast:
    """Read a forecast, of edm2 or with the same names.

    Args:
        path: `.npz`, NetCDF or zarr with `members`, and possibly `truth` and `start`.

    Raises:
        ValueError: If the file cannot be read, or holds no forecast.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give what `edm2 forecast` or `edm2 sample --members` wrote")
    try:
        arrays, settings = _read_npz(path) if path.suffix.lower() == ".npz" else _read_xarray(path)
        if "members" not in arrays:
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, but no 'members'")
        if not isinstance(settings, dict):
            raise ValueError(f"its settings must be an object, not {type(settings).__name__}")
        for name, array in arrays.items():
            dimensions = _DIMENSIONS[name]
            if array.ndim != len(dimensions) or not np.issubdtype(array.dtype, np.number):
                raise ValueError(
                    f"{name} of {array.dtype} {list(array.shape)} must be numbers [{', '.join(dimensions)}]"
                )
    except MissingExtra:
        raise
    except Exception as error:  # zipfile and zlib raise errors of many types for damaged files
        raise ValueError(
            f"{path} is not a forecast ({error}): make it with `edm2 forecast` or `edm2 sample --members`, or write "
            "members [case, member, lead, channel, y, x] and truth, the same without members"
        ) from error
    return Forecast(**arrays, settings=settings)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    arrays = read_arrays(path, _DIMENSIONS)
    with zipfile.ZipFile(path) as archive:
        held = _SETTINGS in archive.namelist() and archive.getinfo(_SETTINGS).file_size < _MOST_SETTINGS
        return arrays, read_json(archive.read(_SETTINGS)) if held else {}


def _read_xarray(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    check_format(path)
    import xarray

    extra: dict[str, Any] = {"consolidated": False} if path.suffix.lower() == ".zarr" else {}
    with reading_fields(path):
        check_fields(path)
        with xarray.open_dataset(path, **extra) as content:
            found = [(name, content[name]) for name in _DIMENSIONS if name in content]
            files = sum(chunk_files(array) for _, array in found)
            check_promise(path, sum(array.nbytes for _, array in found), files)
            arrays = {name: array.values for name, array in found}
            settings = read_json(str(content.attrs.get("settings", "{}")))
    return {n: a.astype(a.dtype.newbyteorder("="), copy=False) for n, a in arrays.items()}, settings
