"""How averages are stored: as float32, bfloat16, or float16 with a scale for each tensor."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from edm2.ema.storage.tensorfile import FileSums, TensorSpec, write_tensors

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TYPICAL_ROUNDING = {"fp32": 3e-8, "bf16": 1.4e-3, "fp16": 1.7e-4}
"""Relative L2 error that storing makes."""

LARGEST_DISTANCE = 1e6
"""Of weights from their average, relative to its norm: what is larger is stored as this."""


class Facts(TypedDict):
    """What is known of an average only while it is at hand."""

    norm: float
    rounding: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Track:
    """One average, ready to be stored.

    Attributes:
        sigma_rel: EMA length of its profile.
        shapes: Shape of each averaged tensor.
        largest: Largest absolute value of each averaged tensor.
        read: Gives an averaged tensor by name, whole, on the CPU; called once for each, in the order of the names.
        copied: The other tensors by name.
        distance: L2 distance of the average to the weights at that time.
        updates: Number of updates whose own rounding it holds; 0 where that is not counted.
        mean_of: Updates in the plain mean of a window.
        complex_names: Averaged tensors that are complex, here as real and imaginary parts.
        write_backs: When the model was set to an average: dicts of t, sigma_rel, keep.
    """

    sigma_rel: float
    shapes: Mapping[str, tuple[int, ...]]
    largest: Mapping[str, float]
    read: Callable[[str], Tensor]
    copied: dict[str, Tensor]
    distance: float
    updates: int = 0
    mean_of: int = 1
    complex_names: Sequence[str] = ()
    write_backs: Sequence[dict[str, Any]] = ()


def arithmetic_rounding(updates: int, distance: float, mean_of: int = 1) -> float:
    """Relative L2 error that rounding leaves in an average tracked in float32.

    The average is rounded when it is read. A plain mean of weights that drift lags behind them by some roundings. And
    the average's offset from the weights is rounded at each update, in long runs at each window; of these no more than
    about a thousand count (see `edm2.ema.tracking.averages`).

    Args:
        updates: Number of updates so far.
        distance: Relative L2 distance of the average to the weights.
        mean_of: Updates in the plain mean of a window.
    """
    return math.hypot(2.0**-25 * (1 + 0.4 * (mean_of - 1)), 1e-8 * min(updates, 1024) * distance)


def write_track(
    path: Path,
    track: Track,
    *,
    dtype: str,
    metadata: dict[str, str],
    name: Callable[[FileSums], str] | None = None,
) -> tuple[FileSums, Facts]:
    """Write one average to a file.

    Args:
        path: File to write.
        track: The average.
        dtype: fp32, bf16 or fp16.
        metadata: Strings for the header; scales are added.
        name: See `write_tensors`.

    Returns:
        Checksums, and norm, rounding and distance of the average.

    Raises:
        ValueError: If the type is unknown.
        FloatingPointError: If a value is not finite.
        OSError: If it cannot be written.
    """
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r} is not known: choose fp32, bf16 or fp16")
    stored = STORED[dtype]
    scales = {name: _scale(name, largest, stored) for name, largest in track.largest.items()}
    scales = {name: scale for name, scale in scales.items() if scale != 1.0}
    if scales:
        metadata = {**metadata, "scales": json.dumps(scales, sort_keys=True)}
    squares = {"norm": 0.0, "rounding": 0.0}

    def encoded(name: str) -> Tensor:
        if name in track.copied:
            return track.copied[name].detach().cpu()
        exact = track.read(name)
        out = (exact / scales[name]).to(stored) if name in scales else exact.to(stored)
        squares["norm"] += _square(exact)
        if exact.dtype != stored:
            squares["rounding"] += _square(out.to(exact.dtype) * scales.get(name, 1.0) - exact)
        return out

    specs = [TensorSpec(name=n, dtype=stored, shape=shape) for n, shape in track.shapes.items()]
    specs += [TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in track.copied.items()]
    metadata = {**metadata, "dtype": dtype, "copied": json.dumps(sorted(track.copied))}
    optional = {"complex": list(track.complex_names), "write_backs": list(track.write_backs)}
    metadata |= {key: json.dumps(value) for key, value in optional.items() if value}
    sums = write_tensors(path, specs, encoded, metadata, name=name)
    norm = math.sqrt(squares["norm"])
    own_rounding = math.sqrt(squares["rounding"]) / norm if norm else 0.0
    distance = min(track.distance / norm, LARGEST_DISTANCE) if norm else 0.0
    arithmetic = arithmetic_rounding(track.updates, distance, track.mean_of) if track.updates else 0.0
    return sums, {
        "norm": _short(norm),
        "rounding": _short(min(math.hypot(own_rounding, arithmetic), 1.0)),
        "distance": _short(distance),
    }


def largest_value(tensor: Tensor) -> float:
    """Largest absolute value of a tensor; 0 if it is empty."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _scale(name: str, largest: float, stored: torch.dtype) -> float:
    """Power of two that brings a tensor near the top of float16's range; exact to multiply and divide by."""
    if not math.isfinite(largest):
        raise FloatingPointError(
            f"the average of {name!r} is not finite: the weights diverged before this snapshot, which is not"
            " written; go back to the last good checkpoint"
        )
    if stored != torch.float16 or largest == 0.0:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - 15, -120)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _short(value: float) -> float:
    """Six digits: the rest depends on the number of threads, and files of equal runs must be equal."""
    return float(f"{value:.6g}")
