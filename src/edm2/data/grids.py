"""Fields in zarr groups and NetCDF files, read from the disk when they are asked for.

Both come from the extra `science`. Arrays with named dimensions are read through xarray, which applies scale, offset
and fill value; plain zarr arrays as they are.
"""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.arrays import hashed_rows
from edm2.data.dataset import ImageDataset, not_finite
from edm2.data.npy import as_stored, check_promise, stored_kind
from edm2.data.pairs import PairedDataset
from edm2.extras import MissingExtra, needed
from edm2.files import read_json

_SOURCE = re.compile(r"(.+\.(?:zarr|nc|nc4|netcdf))(?::([^/\\]+))?", re.IGNORECASE)
_IMAGES, _CONDITIONS = ("output_images", "images"), ("input_images", "conditions")
_MOST_VALUES = 1 << 28  # in the fields of one case: a forged header could promise more than fits into memory
_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")


def split_source(source: str | Path) -> tuple[Path, tuple[str, ...]] | None:
    """Path and names of `FILE.zarr:NAME,NAME` or `FILE.nc`; None for other sources and for files that do not exist."""
    match = _SOURCE.fullmatch(str(source))
    if match is None:
        return None
    path = Path(match[1]).expanduser()
    names = tuple(name.strip() for name in (match[2] or "").split(",") if name.strip())
    return (path, names) if path.exists() else None


def open_grids(
    path: Path,
    names: Sequence[str] = (),
    *,
    labels: bool = True,
    missing: bool = False,
    given: bool = False,
) -> ImageDataset:
    """Open fields as images, with the conditions, vectors and labels beside them.

    Args:
        path: Folder of a zarr group, or NetCDF file.
        names: Arrays `[N, H, W]` or `[N, C, H, W]` whose channels together make an image. Default: `output_images` or
            `images`, with `input_images` or `conditions`, `vectors` `[N, D]` and `labels` `[N]` where these exist.
        labels: Whether to read labels.
        missing: Whether NaN is a missing value; otherwise it is an error.
        given: Whether to open what a model is given, the conditions and vectors, without the images.

    Raises:
        ValueError: If the file cannot be read, an array does not exist, or shapes do not fit.
    """
    arrays = _open(path)
    if names:
        return GridDataset(arrays, names, path, missing=missing)
    images, conditions = (
        next((name for name in known if name in arrays), None) for known in (_IMAGES, _CONDITIONS)
    )
    if given and conditions is not None:
        images, conditions, labels = conditions, None, False
    if images is None:
        raise ValueError(
            f"{path} has no array {' or '.join(_IMAGES)}, but {_listed(arrays)}: name what makes an image, as in "
            f"{path}:{next(iter(arrays), 'NAME')}"
        )
    dataset: ImageDataset = GridDataset(
        arrays, [images], path, labels=arrays.get("labels") if labels else None, missing=missing
    )
    vectors = arrays["vectors"].all() if "vectors" in arrays else None
    if conditions is None and vectors is None:
        return dataset
    beside = None if conditions is None else GridDataset(arrays, [conditions], path, missing=missing)
    return PairedDataset(dataset, beside, vectors)


class GridDataset(ImageDataset):
    """Images whose channels lie in one or more arrays of a file.

    The fingerprint is of shapes and of evenly spaced cases that fill up to 256 MiB.

    Args:
        arrays: All arrays of the file, by name.
        names: Those that make an image, `[N, H, W]` or `[N, C, H, W]`.
        path: The file, for messages.
        labels: Array of classes, `[N]`.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: If an array does not exist or is not numeric, or shapes differ.
    """

    def __init__(
        self,
        arrays: "dict[str, _Array]",
        names: Sequence[str],
        path: Path,
        *,
        labels: "_Array | None" = None,
        missing: bool = False,
    ) -> None:
        for name in names:
            if name not in arrays:
                raise ValueError(f"{path} has no array {name!r}, but {_listed(arrays)}")
        self._arrays, self._where = [arrays[name] for name in names], f"{path}:{','.join(names)}"
        shapes = [array.shape for array in self._arrays]
        outline = {(*shape[:1], *shape[-2:]) for shape in shapes}
        if len(outline) > 1 or any(len(shape) not in (3, 4) or 0 in shape for shape in shapes):
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            raise ValueError(
                f"the arrays of {path} must be [N, H, W] or [N, C, H, W] with the same N, H and W: {shown}"
            )
        channels = sum(1 if len(shape) == 3 else shape[1] for shape in shapes)
        height, width = shapes[0][-2:]
        if channels * height * width > _MOST_VALUES:
            raise ValueError(
                f"{self._where} has {channels} fields of {height}x{width} per case, more than {_MOST_VALUES:,} values: "
                "cut it into smaller ones"
            )
        try:
            kinds = {stored_kind(array.dtype) for array in self._arrays}
        except ValueError as error:
            raise ValueError(f"{self._where} does not hold images ({error})") from error
        dtype = np.dtype(kinds.pop() if len(kinds) == 1 else "float32")
        super().__init__(
            name=path.stem,
            image_shape=(channels, height, width),
            dtype=dtype,
            labels=None if labels is None else labels.all(),
            fingerprint="",
            size=shapes[0][0],
            missing=missing and dtype == np.float32,
        )
        digest = hashlib.sha256(f"grids {names} {shapes} {dtype}".encode())
        for row in hashed_rows(len(self), channels * height * width * dtype.itemsize):
            digest.update(self._fields(np.array([row])).astype(dtype.newbyteorder("<"), copy=False).data)
        if self._labels is not None:
            digest.update(self._labels.astype("<i8", copy=False).data)
        self.fingerprint = digest.hexdigest()

    def image_name(self, index: int) -> str:
        """What messages call a case."""
        return f"case {index} of {self._where}"

    def _fields(self, indices: np.ndarray) -> np.ndarray:
        height, width = self.image_shape[1:]
        parts = [as_stored(array.rows(indices)) for array in self._arrays]
        fields = [part.reshape(len(indices), -1, height, width) for part in parts]
        return np.ascontiguousarray(np.concatenate(fields, axis=1).astype(self.dtype, copy=False))

    def _read(self, indices: np.ndarray) -> np.ndarray:
        fields = self._fields(indices)
        if self.dtype == np.float32 and (bad := not_finite(fields, missing=self.missing)):
            raise ValueError(f"{self._where} holds {bad}")
        return fields


class _Array:
    """An array on the disk: a zarr array, or a variable of xarray."""

    def __init__(self, path: Path, name: str, source: Any) -> None:
        self._where, self._source = f"{path}:{name}", source
        self.shape: tuple[int, ...] = tuple(source.shape)
        self.dtype = np.dtype(source.dtype)
        chunk = getattr(source, "chunks", None) or getattr(source, "encoding", {}).get("chunks") or ()
        with reading_fields(self._where):
            size = max(math.prod(self.shape), math.prod(chunk)) * self.dtype.itemsize
            check_promise(path, size, chunk_files(source))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the first axis."""
        with reading_fields(self._where):
            if hasattr(self._source, "isel"):
                return np.asarray(self._source.isel({self._source.dims[0]: indices}).to_numpy())
            return np.asarray(self._source.oindex[indices])

    def all(self) -> np.ndarray:
        """All values, of small arrays."""
        return self.rows(np.arange(self.shape[0]))


def chunk_files(array: Any) -> int:
    """Number of files of a zarr array, or of one that xarray opened, if none is left out; 1 for other formats."""
    encoding = getattr(array, "encoding", {})
    chunk = getattr(array, "shards", None) or getattr(array, "chunks", None)
    chunk = chunk or encoding.get("shards") or encoding.get("chunks") or array.shape
    return math.prod(-(-side // max(part, 1)) for side, part in zip(array.shape, chunk, strict=False))


@contextlib.contextmanager
def reading_fields(where: object) -> Iterator[None]:
    """Raise ValueError for whatever zarr, HDF5, xarray and their codecs raise for damaged files."""
    try:
        yield
    except MissingExtra:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{where} cannot be read ({reason}): restore it from a copy, or give another path"
        ) from error


def _open(path: Path) -> dict[str, _Array]:
    is_zarr = path.is_dir()
    with needed(f"reading {path.name}"):
        import xarray
        import zarr

        if not is_zarr and not _is_netcdf3(path):  # xarray opens these with them
            import h5netcdf  # noqa: F401
            import h5py  # noqa: F401
    with reading_fields(path):
        named: dict[str, Any]
        check_fields(path)
        if is_zarr:
            group = zarr.open_group(str(path), mode="r")
            arrays = dict(group.arrays())
            if not all(_has_dimensions(array) for array in arrays.values()):
                return {name: _Array(path, name, array) for name, array in arrays.items()}
            named = {"engine": "zarr", "consolidated": False}
        else:
            named = {"engine": "scipy" if _is_netcdf3(path) else "h5netcdf"}
        content = xarray.open_dataset(path, cache=False, decode_times=False, **named)
        return {str(name): _Array(path, str(name), array) for name, array in content.data_vars.items()}


def _is_netcdf3(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(3) == b"CDF"


def check_fields(path: Path) -> None:
    """Raise an error if reading a zarr group would run code, or if the outermost part of an HDF5 file is damaged.

    A codec of a zarr group may unpickle its data. A damaged file leaves an h5netcdf.File half made, which complains on
    standard error when it is collected.
    """
    for file in _metadata(path):
        if _names_pickle(read_json(file, finite=False)):
            raise ValueError(f"{file.relative_to(path)} asks for unpickling, which can run code")
    if path.is_file() and not _is_netcdf3(path):
        with needed(f"reading {path.name}"):
            import h5py
        with h5py.File(path) as content:
            content.attrs.get("_nc3_strict")  # the first thing that h5netcdf reads


def _metadata(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where) / name for name in files if name in _METADATA)
        if ".zarray" in files or "c" in folders:  # below are chunks alone
            folders.clear()


def _names_pickle(content: Any) -> bool:
    if isinstance(content, dict):
        codec = [content.get(key) for key in ("id", "name")]
        return any(isinstance(name, str) and "pickle" in name.lower() for name in codec) or any(
            _names_pickle(value) for value in content.values()
        )
    return isinstance(content, list) and any(_names_pickle(value) for value in content)


def _has_dimensions(array: Any) -> bool:
    return "_ARRAY_DIMENSIONS" in array.attrs or bool(getattr(array.metadata, "dimension_names", None))


def _listed(arrays: dict[str, _Array]) -> str:
    shown = [f"{name} {list(array.shape)}" for name, array in list(arrays.items())[:8]]
    return ", ".join(shown) or "none at all"
