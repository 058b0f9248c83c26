"""What the state of a tracker must be before it is loaded."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edm2.ema.tracking.sharding import is_sharded, local

FORMAT = "edm2.ema.PowerEMA/2"
_FIRST_FORMAT = "edm2.ema.PowerEMA/1"  # averages as they are, and a window relative to the first of them
_NUMBER = (int, float)
_VALUES: dict[str, type | tuple[type, ...]] = {
    "run_id": str, "start": _NUMBER, "t": _NUMBER, "folded": _NUMBER, "based": _NUMBER, "steps": int,
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
    if broken or not _is_in_order(state, has_window=any(k.startswith("window.") for k in given)):
        raise ValueError(
            f"the state is not one that state_dict returned: {', '.join(broken) or 't'} is missing or wrong; load what"
            " this run's PowerEMA.state_dict() returned"
        )


def _is_in_order(state: Mapping[str, Any], *, has_window: bool) -> bool:
    start, based, folded, t = (state[k] for k in ("start", "based", "folded", "t"))
    return bool(start <= based <= folded <= t < math.inf and has_window == (folded < t))


def _sharded_otherwise(tensor: Tensor, given: Tensor) -> bool:
    return is_sharded(given) and local(tensor).shape != local(given).shape


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state in today's format: earlier ones held the averages themselves."""
    if state.get("format") != _FIRST_FORMAT:
        return state
    new = {k: v for k, v in state.items() if not isinstance(v, Tensor) and k != "folds"}
    folded = state.get("folded", state.get("t"))
    new |= {"format": FORMAT, "folded": folded, "based": folded, "steps": 0, "write_backs": [], "live": None}
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
