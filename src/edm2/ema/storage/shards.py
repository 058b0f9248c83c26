"""Models stored in one file or in pieces, read tensor by tensor, and written back the same way with other values.

Reads safetensors files, Hugging Face's sharded safetensors (`model.safetensors.index.json`), folders of
`torch.distributed.checkpoint`, and files of torch.save. Nothing in them is executed.
"""

import io
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.ema.storage.guarded_json import read_json
from edm2.ema.storage.tensorfile import TensorFile, TensorSpec, read_header, write_tensors
from edm2.ema.storage.weighted_sums import read_tensors

INDEX_SUFFIX = ".safetensors.index.json"
DISTRIBUTED = ".metadata"
_MAX_METADATA = 256 << 20


class StoredModel(ABC):
    """The tensors of a checkpoint by their stored names.

    Attributes:
        path: File or folder.
        specs: Type and shape of each tensor.
    """

    path: Path
    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor, whole, on the CPU."""

    @abstractmethod
    def write_like(self, folder: Path, order: Callable[[str], Tensor]) -> list[Path]:
        """Write a model with the same names, types, shapes and files, but other values.

        Args:
            folder: An existing folder.
            order: Gives the new value of a tensor, in its own shape; called once for each name, file by file.

        Returns:
            The files written.
        """


def open_model(path: Path) -> StoredModel | None:
    """Open a checkpoint whose tensors can be read one at a time; None if it is none of these formats.

    Raises:
        ValueError: If it is damaged, incomplete, or holds more than tensors.
    """
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indices) > 1:
            raise ValueError(
                f"{path} holds {len(indices)} indices ({indices[0].name}, ...): give the one that you mean"
            )
        if indices:
            return _Safetensors(path, _shards(indices[0]), index=indices[0])
        return _Distributed(path) if (path / DISTRIBUTED).is_file() else None
    if path.name.endswith(INDEX_SUFFIX):
        return _Safetensors(path.parent, _shards(path), index=path)
    return _Safetensors(path, [read_header(path)]) if path.suffix.lower() == ".safetensors" else None


def _shards(index: Path) -> list[TensorFile]:
    try:
        content = read_json(index)
        files = content["weight_map"] if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(
            isinstance(f, str) and Path(f).name == f for f in files.values()
        ):
            raise ValueError("its weight_map does not name files of its folder")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is damaged ({error}): restore it from a copy") from error
    headers = []
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise ValueError(
                f"{index} names {name}, which is missing: copy all parts of the model to one folder"
            )
        headers.append(read_header(index.parent / name))
    lost = next(
        (n for n, f in files.items() if not any(n in h.specs for h in headers if h.path.name == f)), None
    )
    if lost is not None:
        raise ValueError(
            f"{index} places {lost!r} in {files[lost]}, which does not hold it: restore both from a copy"
        )
    return headers


class _Safetensors(StoredModel):
    def __init__(self, path: Path, files: Sequence[TensorFile], index: Path | None = None) -> None:
        self.path, self._files, self._index = path, files, index
        self._file_of = {name: file for file in files for name in file.specs}
        self.specs = {name: file.specs[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        (entry,) = read_tensors(self._file_of[name], [name])
        return entry[1]

    def write_like(self, folder: Path, order: Callable[[str], Tensor]) -> list[Path]:
        written = [write_safetensors(folder / f.path.name, f.specs, order, f.metadata) for f in self._files]
        if self._index is not None:
            written.append(Path(shutil.copyfile(self._index, folder / self._index.name)))
        return written


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    order: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> Path:
    """Write one file of a model; see `StoredModel.write_like`."""
    write_tensors(path, specs.values(), lambda name: order(name).to(specs[name].dtype), metadata)
    return path


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it begins and how large it is, in elements, and the bytes of a file that hold it."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(b, b + n) for b, n in zip(self.begin, self.shape, strict=True))


class _Distributed(StoredModel):
    """A folder of `torch.distributed.checkpoint`: each file holds parts of tensors, each as torch.save writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            metadata = _read_metadata(path / DISTRIBUTED)
            self._chunks = _chunks(metadata)
            self.specs = {n: TensorSpec(name=n, dtype=d, shape=s) for n, (d, s) in _tensors(metadata).items()}
            self._check()
        except ValueError:
            raise
        except Exception as error:  # a damaged pickle may end in any
            raise ValueError(
                f"{path / DISTRIBUTED} is damaged ({error!r:.100}): restore it from a copy"
            ) from error

    def _check(self) -> None:
        sizes = {chunk.file: -1 for chunks in self._chunks.values() for chunk in chunks}
        for name in sizes:
            if Path(name).name != name or not (self.path / name).is_file():
                raise ValueError(
                    f"{self.path} lacks the part {name!r}: copy all parts of the checkpoint to one folder"
                )
            sizes[name] = (self.path / name).stat().st_size
        for name, spec in self.specs.items():
            chunks = self._chunks.get(name, [])
            inside = all(
                min(*c.begin, *c.shape, c.offset, c.length, 0) == 0
                and all(b + n <= size for b, n, size in zip(c.begin, c.shape, spec.shape, strict=True))
                and c.offset + c.length <= sizes[c.file]
                for c in chunks
            )
            stored = sum(c.length for c in chunks)
            covered = sum(TensorSpec(name="", dtype=spec.dtype, shape=c.shape).numel for c in chunks)
            if not inside or covered != spec.numel or spec.num_bytes > stored:
                raise ValueError(f"{self.path} does not hold all of {name!r}: restore it from a copy")

    def read(self, name: str) -> Tensor:
        spec = self.specs[name]
        out = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in self._chunks[name]:
            with open(self.path / chunk.file, "rb") as file:
                file.seek(chunk.offset)
                data = file.read(chunk.length)
            try:
                value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                out[chunk.place] = value.reshape(chunk.shape)
            except Exception as error:  # torch raises errors of many types for damaged and hostile files
                reason = str(error).partition("\n")[0][:200]
                raise ValueError(
                    f"{self.path / chunk.file} is damaged at {name!r} ({reason}): leave it out"
                ) from error
        return out

    def write_like(self, folder: Path, order: Callable[[str], Tensor]) -> list[Path]:
        files = sorted({chunk.file for chunks in self._chunks.values() for chunk in chunks})
        written = [Path(shutil.copyfile(self.path / name, folder / name)) for name in (DISTRIBUTED, *files)]
        for name, spec in self.specs.items():
            value = order(name).to(spec.dtype)
            for chunk in self._chunks[name]:
                data = io.BytesIO()
                torch.save(value[chunk.place].clone(), data)
                if data.tell() != chunk.length:
                    raise ValueError(
                        f"{self.path / chunk.file} stores {name!r} in {chunk.length} bytes, this torch in"
                        f" {data.tell()}: merge with the version of torch that wrote it"
                    )
                with open(folder / chunk.file, "r+b") as file:
                    file.seek(chunk.offset)
                    file.write(data.getbuffer())
        return written


class _Inert:
    """Stands for every class of the metadata: it keeps its state and does nothing."""

    state: Any = {}  # noqa: RUF012 (replaced, never changed)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


_KNOWN = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
    "pathlib._local",  # what Python 3.13 calls it
}


class _Metadata(pickle._Unpickler):  # the C one allocates what a file asks for
    def find_class(self, module: str, name: str) -> Any:
        if module in _KNOWN:
            return type(name, (_Inert,), {})
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(int(n) for n in sizes)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 stores members of enumerations
            return lambda *_: None
        raise ValueError(f"it names {module}.{name}, which no metadata of torch.distributed.checkpoint needs")


def _read_metadata(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_METADATA:
        raise ValueError(
            f"{path} is larger than {_MAX_METADATA >> 20} MB: it is not metadata of a checkpoint"
        )
    try:
        state: dict[str, Any] = _Metadata(io.BytesIO(path.read_bytes())).load().state
        return state
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or holds more than metadata ({error}): leave it out") from error


def _tensors(metadata: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    found = {}
    for name, entry in metadata["state_dict_metadata"].items():
        if "size" in entry.state:
            properties = entry.state["properties"].state
            dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
            found[str(name)] = (dtype, tuple(entry.state["size"]))
    return found


def _chunks(metadata: dict[str, Any]) -> dict[str, list[_Chunk]]:
    shapes = {
        (name, tuple(chunk.state["offsets"])): tuple(chunk.state["sizes"])
        for name, entry in metadata["state_dict_metadata"].items()
        for chunk in entry.state.get("chunks", ())
    }
    found: dict[str, list[_Chunk]] = {}
    for index, place in metadata["storage_data"].items():
        name, begin = index.state["fqn"], index.state.get("offset")
        if begin is None or (name, tuple(begin)) not in shapes:
            continue  # not a tensor
        if place.state.get("transform_descriptors"):
            raise ValueError(
                f"{name!r} is compressed, which is not supported: save the checkpoint without extensions"
            )
        found.setdefault(name, []).append(
            _Chunk(
                tuple(begin), shapes[name, tuple(begin)], place.state["relative_path"], place.state["offset"],
                place.state["length"],
            )
        )  # fmt: skip
    return found
