"""Weighted sums of many files, read side by side, a piece of each at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import FileIO
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from edm2.ema.maths.profiles import FloatArray
from edm2.ema.storage.tensorfile import DTYPES, ByteArray, DataSum, TensorFile, add_side_by_side

# Pieces of a few files stay in the processor's cache while they are checked and added to all sums.
_PIECE, _FILES = 1 << 17, 8
_MAX_OPEN = 256
_ROWS = 4


class WeightedSums:
    """Reads files once, side by side, and adds them up into several sums.

    Args:
        files: Files that hold the same tensors.
        coefficients: Weight of each file in each sum [in, out].
        scales: For each file, the factor of each tensor that was stored divided by one.

    Attributes:
        data_sums: Checksum of each file's data read so far.
    """

    def __init__(
        self, files: Sequence[TensorFile], coefficients: FloatArray, *, scales: Sequence[dict[str, float]]
    ) -> None:
        self._files = files
        self._coefficients = coefficients
        self._scales = scales
        self.data_sums = [DataSum() for _ in files]

    def run(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Add up the named tensors.

        Args:
            names: Floating-point tensors that all files hold.

        Returns:
            Name -> float32 tensor, one dict a sum.
        """
        num_out = self._coefficients.shape[1]
        shapes = {name: self._files[0].specs[name].shape for name in names}
        sums = [{n: torch.zeros(shape) for n, shape in shapes.items()} for _ in range(num_out)]
        for first in range(0, len(self._files), _MAX_OPEN):
            opened = range(first, min(first + _MAX_OPEN, len(self._files)))
            with ExitStack() as stack:
                handles = {
                    i: stack.enter_context(open(self._files[i].path, "rb", buffering=0)) for i in opened
                }
                for name in names:
                    self._add_tensor(name, handles, [s[name].view(-1) for s in sums])
        return sums

    def _add_tensor(self, name: str, handles: dict[int, FileIO], sums: list[Tensor]) -> None:
        scales = np.array([s.get(name, 1.0) for s in self._scales])
        # A product of fewer than four rows rounds differently, and a sum must not depend on the others of its pass.
        weights = torch.zeros(max(len(sums), _ROWS), len(scales))
        weights[: len(sums)] = torch.from_numpy(self._coefficients * scales[:, None]).T
        numel = sums[0].numel()
        # In the widest type; the others need less.
        room = torch.empty(_FILES * (min(numel, _PIECE) + 1), dtype=torch.float64).view(torch.uint8)
        totals = torch.empty(len(weights), min(numel, _PIECE))
        order = list(handles)
        for begin in range(0, numel, _PIECE):
            pieces = [out[begin : begin + _PIECE] for out in sums]
            total = totals[:, : pieces[0].numel()].zero_()
            for first in range(0, len(order), _FILES):
                group = {i: handles[i] for i in order[first : first + _FILES]}
                rows = self._read(name, begin, total.shape[1], group, room)
                total.addmm_(weights[:, [*group]], rows)
            for piece, row in zip(pieces, total, strict=False):
                piece.add_(row)

    def _read(self, name: str, begin: int, count: int, handles: dict[int, FileIO], room: Tensor) -> Tensor:
        """Elements of a tensor from some files as float32 [files, count]; adds them to the files' checksums."""
        of_type: dict[torch.dtype, list[int]] = {}
        for i in handles:
            of_type.setdefault(self._files[i].specs[name].dtype, []).append(i)
        found: dict[int, Tensor] = {}
        for dtype, chosen in of_type.items():
            size, start = count * dtype.itemsize, begin * dtype.itemsize
            stride = -(-size // 8) * 8
            data = room[: len(chosen) * stride].view(len(chosen), stride)
            data[:, size:] = 0
            offsets = [self._files[i].offsets[name] for i in chosen]
            for i, offset, row in zip(chosen, offsets, data.numpy(), strict=True):
                read_exactly(handles[i], self._files[i], offset + start, row[:size])
            sums = [self.data_sums[i] for i in chosen]
            add_side_by_side(sums, data.numpy().view(np.uint64), tensors=offsets, begin=start)
            rows = data[:, :size].view(dtype).float()
            if len(of_type) == 1:
                return rows
            found |= dict(zip(chosen, rows.clone(), strict=True))
        return torch.stack([found[i] for i in handles])


def read_exactly(handle: FileIO, file: TensorFile, position: int, out: ByteArray) -> None:
    """Fill an array of bytes from a place in a file.

    Raises:
        ValueError: If the file ends before that.
    """
    handle.seek(position)
    view, done = out.data, 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise _cut_short(file)
        done += count


def _cut_short(file: TensorFile) -> ValueError:
    return ValueError(f"{file.path} is cut short: restore it from a copy")


def read_elements(
    file: TensorFile, places: Sequence[tuple[str, int, int]], scales: dict[str, float]
) -> FloatArray:
    """Some elements of a file's tensors, one after the other.

    Args:
        file: An open file's header.
        places: Tensor's name, first element and number of elements of each run.
        scales: Factor of each tensor that was stored divided by one.
    """
    parts = []
    with open(file.path, "rb", buffering=0) as handle:
        for name, runs in groupby(places, key=itemgetter(0)):
            dtype, pieces, wanted = file.specs[name].dtype, [], 0
            for _, start, length in runs:
                handle.seek(file.offsets[name] + start * dtype.itemsize)
                pieces.append(handle.read(length * dtype.itemsize))
                wanted += length
            data = bytearray(b"".join(pieces))
            if len(data) != wanted * dtype.itemsize:
                raise _cut_short(file)
            parts.append(torch.frombuffer(data, dtype=dtype).double().numpy() * scales.get(name, 1.0))
    return np.concatenate(parts)


def read_tensors(
    file: TensorFile, names: Sequence[str], data_sum: DataSum | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file as they are stored, added to a checksum if one is given."""
    assert all(file.specs[name].dtype in DTYPES.values() for name in names)
    with open(file.path, "rb", buffering=0) as handle:
        for name in names:
            spec = file.specs[name]
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            data = tensor.view(-1).view(torch.uint8).numpy()
            read_exactly(handle, file, file.offsets[name], data)
            if data_sum is not None:
                data_sum.add(data, tensor=file.offsets[name])
            yield name, tensor


_SAMPLE = 32768
_RUN = 64


def sample_squares(
    files: Sequence[TensorFile], names: Sequence[str], scales: Sequence[dict[str, float]]
) -> FloatArray:
    """Estimate the squared L2 distances between the tensors of files.

    Tensors are sampled in short runs at even spacing, in proportion to their size; small ones are read whole.

    Args:
        files: Files that hold the same tensors.
        names: The tensors to compare.
        scales: For each file, factor of each tensor that was stored divided by one.

    Returns:
        Squared distances [n, n].

    Raises:
        ValueError: If a file holds values that are not finite.
    """
    total = sum(files[0].specs[name].numel for name in names)
    places: list[tuple[str, int, int]] = []
    weights: list[FloatArray] = []
    for name in names:
        numel = files[0].specs[name].numel
        if not numel:
            continue
        runs = min(-(-numel // _RUN), max(1, round(_SAMPLE / _RUN * numel / total)))
        length = min(_RUN, numel)
        starts = np.unique(np.linspace(0, numel - length, runs).astype(np.int64))
        places += [(name, int(start), length) for start in starts]
        weights.append(np.full(starts.size * length, numel / (starts.size * length)))
    rows = np.stack([read_elements(f, places, scale) for f, scale in zip(files, scales, strict=True)])
    for file, row in zip(files, rows, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(
                f"{file.path} is damaged: it holds values that are not finite; restore it from a copy"
            )
    rows -= rows[-1]
    rows *= np.sqrt(np.concatenate(weights))
    gram = rows @ rows.T
    square = np.diag(gram)
    return np.asarray(np.maximum(square[:, None] + square - 2 * gram, 0.0))
