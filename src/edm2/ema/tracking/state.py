"""What the state of a tracker must be before it is loaded."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.ema.reconstruct import Reconstruction, reconstruct_many
from edm2.ema.storage.manifest import RunInfo, read_manifest
from edm2.ema.tracking.averages import open_windows
from edm2.ema.tracking.sharding import is_sharded, local

FORMAT = "edm2.ema.PowerEMA/4"
_THIRD_FORMAT = "edm2.ema.PowerEMA/3"  # one window for all averages
_SECOND_FORMAT = "edm2.ema.PowerEMA/2"  # windows are offsets
_FIRST_FORMAT = "edm2.ema.PowerEMA/1"  # averages as they are, and a window relative to the first of them
_NUMBER = (int, float)
_VALUES: dict[str, type | tuple[type, ...]] = {
    "run_id": str, "start": _NUMBER, "t": _NUMBER, "folded": _NUMBER, "based": _NUMBER, "held": int, "steps": int,
    "updates": int, "write_backs": list,
}  # fmt: skip


def check_state(state: Mapping[str, Any], settings: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
    """Make sure that a state is complete and belongs to this tracker.

    Args:
        state: What is to be loaded.
        settings: This tracker's values that the state must share.
        like: The tracker's tensors by key, with those of the window if the state has them.

    Raises:
        ValueError: If it is of other tracks, another clock or another model, or incomplete.
    """
    for key, value in settings.items():
        if state.get(key) != value:
            raise ValueError(
                f"the state's {key} is {state.get(key)!r}, this tracker's is {value!r}: build the"
                " PowerEMA with the settings of the run that is resumed"
            )
    given = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    differing = sorted(
        k for k in like.keys() | given.keys()
        if getattr(like.get(k), "shape", None) != getattr(given.get(k), "shape", None)
    )  # fmt: skip
    if differing:
        raise ValueError(
            f"the state is of another model: {len(differing)} tensors are missing, new or of another"
            f" shape, first {differing[0]!r}"
        )
    broken = [k for k, kind in _VALUES.items() if not isinstance(state.get(k), kind)]
    broken += [k for k, x in like.items() if _sharded_otherwise(x, given[k])]
    if not broken and state["held"] < 0:
        broken = ["held"]
    if broken or not _is_in_order(state, has_window=open_windows(given) > 0):
        raise ValueError(
            f"the state is not one that state_dict returned: {', '.join(broken) or 't'} is missing or wrong; load what"
            " this run's PowerEMA.state_dict() returned"
        )


def _is_in_order(state: Mapping[str, Any], *, has_window: bool) -> bool:
    start, based, folded, t = (state[k] for k in ("start", "based", "folded", "t"))
    # The base is renewed as a window opens, so that it may be newer than what is folded.
    return bool(start <= based <= t and start <= folded <= t < math.inf and has_window == (folded < t))


def _sharded_otherwise(tensor: Tensor, given: Tensor) -> bool:
    return is_sharded(given) and local(tensor).shape != local(given).shape


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state in today's format: earlier ones held the averages themselves."""
    if state.get("format") == _THIRD_FORMAT:
        return {**state, "format": FORMAT}
    if state.get("format") == _SECOND_FORMAT:
        return {**state, "format": FORMAT, "held": 0}
    if state.get("format") != _FIRST_FORMAT:
        return state
    new = {k: v for k, v in state.items() if not isinstance(v, Tensor) and k != "folds"}
    folded = state.get("folded", state.get("t"))
    new |= {
        "format": FORMAT,
        "folded": folded,
        "based": folded,
        "held": 0,
        "steps": 0,
        "write_backs": [],
        "live": None,
    }
    for key, average in state.items():
        kind, _, name = key.partition(".")
        first = state.get(f"average.0.{name.partition('.')[2]}" if kind == "average" else f"average.0.{name}")
        if not isinstance(average, Tensor) or not isinstance(first, Tensor):
            continue
        base = first.to(torch.bfloat16)
        if kind == "average":
            new[f"offset.{name}"] = base - average
            new[f"base.{name.partition('.')[2]}"] = base
        elif kind == "window":
            new[key] = base - (first + average)
    return new


def stored_tracks(
    folder: str | Path, sigma_rels: Sequence[float], t: float | None
) -> tuple[RunInfo, list[Reconstruction]]:
    """Averages as they are stored, of one time, with their run.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        sigma_rels: EMA lengths of the tracks.
        t: Time of the snapshot. Default: the last one.

    Raises:
        ValueError: If one of them is not stored, or a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    times = sorted({s.t for s in manifest.snapshots})
    t = times[-1] if t is None and times else t
    stored = [s.sigma_rel for s in manifest.snapshots if s.t == t]
    missing = [s for s in sigma_rels if s not in stored]
    if missing:
        raise ValueError(
            f"{folder} has no snapshot of sigma_rel {missing[0]:g} at t {t}: at that time it has EMA lengths"
            f" {stored}, and times {times}"
        )
    return manifest.run, reconstruct_many(folder, sigma_rels, t)
