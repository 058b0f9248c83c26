"""safetensors files written and read as a stream.

The safetensors package needs all tensors of a file in memory to write it, and cannot hash on the way. The format is
a JSON header followed by raw bytes, so both are done here; the package reads the result.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edm2.ema.storage.guarded_json import read_json
from edm2.ema.storage.replacing import replacing

ByteArray = npt.NDArray[np.uint8]
_ROW = 1024
_MODULUS = 1 << 64
_COLUMNS, _INDEX = np.arange(_ROW, dtype=np.uint64), np.arange(1 << 16, dtype=np.uint64)


class DataSum:
    """Two sums over 64-bit words, modulo 2**64: plain, and weighted by position.

    The plain sum sees every changed bit, the weighted one also words and blocks that changed places. Data may
    be added in any order and in pieces that are multiples of eight bytes; the last bytes of a tensor are filled
    up with zeros.
    """

    def __init__(self) -> None:
        self.plain = self.weighted = 0

    def add(self, data: ByteArray, *, tensor: int, begin: int = 0) -> None:
        """Add a piece of a tensor.

        Args:
            data: Its bytes [n].
            tensor: Place of the tensor in the file, in bytes.
            begin: Place of the piece in the tensor, in bytes; a multiple of eight.
        """
        words = data[: data.size // 8 * 8].view("<u8")
        last = data[words.size * 8 :]
        if last.size:
            words = np.append(words, np.uint64(int.from_bytes(last.tobytes(), "little")))
        add_side_by_side([self], words[None], tensors=[tensor], begin=begin)

    def __str__(self) -> str:
        return f"{self.plain % _MODULUS:016x}{self.weighted % _MODULUS:016x}"

    def matches(self, stored: str) -> bool:
        """Whether this is the stored sum; earlier versions stored the plain one alone."""
        return stored in (str(self), str(self)[:16])


def add_side_by_side(
    sums: Sequence[DataSum], words: npt.NDArray[np.uint64], *, tensors: Sequence[int], begin: int
) -> None:
    """Add a piece of a tensor in each of several files to the files' sums.

    Args:
        sums: One for each file.
        words: The piece in each file, filled up with zeros to whole words [files, n].
        tensors: Place of the tensor in each file, in bytes.
        begin: Place of the piece in the tensor, in bytes; a multiple of eight.
    """
    plain, weighted = np.zeros((2, len(words)), np.uint64)
    for first in range(0, words.shape[1], _ROW * _INDEX.size):
        part = words[:, first : first + _ROW * _INDEX.size]
        whole = part.shape[1] // _ROW * _ROW
        table, rest = part[:, :whole].reshape(len(part), -1, _ROW), part[:, whole:]
        # PyTorch adds up along rows faster, numpy along columns; int64 wraps around as uint64 does.
        rows = torch.from_numpy(table.view(np.int64)).sum(2).numpy().view(np.uint64)
        total = rows.sum(axis=1) + rest.sum(axis=1)
        weighted += rows @ _INDEX[: rows.shape[1]] * np.uint64(_ROW) + table.sum(axis=1) @ _COLUMNS
        weighted += rest.sum(axis=1) * np.uint64(whole) + rest @ _COLUMNS[: rest.shape[1]]
        weighted += total * np.uint64(first)
        plain += total
    for data_sum, tensor, p, w in zip(sums, tensors, plain.tolist(), weighted.tolist(), strict=True):
        data_sum.plain += p
        data_sum.weighted += w + (tensor + begin // 8) * p


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, element type and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileSums:
    """Size and checksums of a file: all bytes, its header, and a fast sum over its data."""

    num_bytes: int
    sha256: str
    header_sha256: str
    data_sum: str


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file's header: where each tensor lies, in bytes from the start of the file."""

    path: Path
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]
    header_sha256: str


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Order of tensors in a file: wide elements first, so that each one is aligned; then by name."""
    return sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name))


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    name: Callable[[FileSums], str] | None = None,
) -> FileSums:
    """Write a file tensor by tensor, whole or not at all.

    Args:
        path: File to write or replace.
        specs: What it holds.
        get: Gives a tensor by name, on the CPU, in its spec's type and shape; called in file order.
        metadata: Strings for the header.
        name: Gives the file's final name, in the same folder, from its checksums; default: that of path.

    Returns:
        Size and checksums.

    Raises:
        OSError: If the disk is full or cannot be written.
    """
    order = file_order(specs)
    header = _header(order, metadata)
    sha, data_sum = hashlib.sha256(header), DataSum()
    with replacing(path, name=None if name is None else lambda: name(sums)) as file:
        file.write(header)
        for spec in order:
            tensor = get(spec.name).contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            data: ByteArray = tensor.reshape(-1).view(torch.uint8).numpy()
            data_sum.add(data, tensor=file.tell())
            file.write(data.data)
            sha.update(data.data)
        sums = FileSums(
            num_bytes=file.tell(),
            sha256=sha.hexdigest(),
            header_sha256=hashlib.sha256(header).hexdigest(),
            data_sum=str(data_sum),
        )
    return sums


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors on the CPU to a new safetensors file, whole or not at all.

    Args:
        path: File to write; its folder is made.
        tensors: Name -> tensor; tied ones are written under each name.
        metadata: Strings for the header.

    Returns:
        The path.

    Raises:
        FileExistsError: If the file is there already.
        OSError: If the disk is full or cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name or move it away")
    specs = [TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in tensors.items()]
    write_tensors(path, specs, tensors.__getitem__, metadata)
    return path


def _header(order: list[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for spec in order:
        end = position + spec.num_bytes
        content[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> TensorFile:
    """Read and check where the tensors of a file lie.

    Args:
        path: A safetensors file.

    Returns:
        Its header.

    Raises:
        ValueError: If it is not a whole safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = _raw_header(file, path)
    try:
        content = read_json(raw[8:])
        metadata = content.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not strings")
        specs, offsets, left = {}, {}, size - len(raw)
        for name, entry in content.items():
            spec = TensorSpec(
                name=name, dtype=DTYPES[entry["dtype"]], shape=tuple(map(index, entry["shape"]))
            )
            begin, end = map(index, entry["data_offsets"])
            left -= spec.num_bytes
            if (
                end - begin != spec.num_bytes
                or min(begin, *spec.shape, 0) < 0
                or len(raw) + end > size
                or left < 0
            ):
                raise ValueError(f"tensor {name!r} does not fit into the file")
            specs[name], offsets[name] = spec, len(raw) + begin
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): restore it from a copy"
        ) from error
    return TensorFile(
        path=path,
        specs=specs,
        offsets=offsets,
        metadata=metadata,
        header_sha256=hashlib.sha256(raw).hexdigest(),
    )


def _raw_header(file: BinaryIO, path: Path) -> bytes:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
    raw = start + (file.read(length) if length <= _MAX_HEADER else b"")
    if len(raw) != 8 + length:
        raise ValueError(
            f"{path} is not a whole safetensors file (its header is cut short): restore it from a copy"
        )
    return raw
