"""Where the tensors of a file of torch.save lie, so that they can be read in place; nothing in it is executed."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.ema.storage.tensorfile import TensorFile, TensorSpec


@dataclass(frozen=True, kw_only=True)
class OpenTorchFile:
    """A file of torch.save that holds a dict.

    Attributes:
        file: Where its tensors lie.
        values: The tensors by name, mapped into memory: read from the disk where they are looked at.
        others: What else the dict holds.
    """

    file: TensorFile
    values: dict[str, Tensor]
    others: dict[str, Any]


def open_torch_file(path: Path) -> OpenTorchFile:
    """Find the tensors of a dict that torch.save wrote.

    Args:
        path: File in torch's format since 1.6, a ZIP archive.

    Raises:
        ValueError: If it is damaged, not such a file, or holds more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            places = {_place(path, x) for x in archive.infolist() if "/data/" in x.filename} | {0}
    except Exception as error:  # torch and zipfile raise errors of many types for damaged and hostile files
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{path} is not a file of tensors that torch.save wrote ({reason}): leave it out"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors: leave it out")
    values = {name: x for name, x in content.items() if isinstance(x, Tensor)}
    # All storages are slices of one mapping of the file: find the address of the file's start that puts each one where
    # the archive has a record.
    addresses = {x.untyped_storage().data_ptr() for x in values.values() if x.numel()}
    lowest = min(addresses, default=0)
    start = next((lowest - p for p in places if all(a - lowest + p in places for a in addresses)), None)
    if start is None:
        raise ValueError(
            f"{path} does not lay out its tensors as torch.save does: save it again with torch.save"
        )
    loose = next((n for n, x in values.items() if not x.is_contiguous()), None)
    if loose is not None:
        raise ValueError(
            f"{path} stores {loose!r} in another order than row-major (channels_last?): save contiguous tensors"
        )
    file = TensorFile(
        path=path,
        specs={n: TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in values.items()},
        offsets={n: x.data_ptr() - start if x.numel() else 0 for n, x in values.items()},
        metadata={},
        header_sha256="",
    )
    return OpenTorchFile(
        file=file, values=values, others={n: x for n, x in content.items() if n not in values}
    )


def _place(path: Path, record: zipfile.ZipInfo) -> int:
    """Where the data of an uncompressed record begins: behind a header of 30 bytes, its name and its padding."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{record.filename} is compressed")
    with open(path, "rb") as file:
        file.seek(record.header_offset)
        header = file.read(30)
    return (
        record.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
