"""What the state of a tracker must be before it is loaded."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edm2.ema.tracking.tensors import is_sharded, local

_VALUES: dict[str, type | tuple[type, ...]] = {
    "run_id": str,
    "start": (int, float),
    "t": (int, float),
    "updates": int,
}
# States of before there were windows lack these.
_LATER_VALUES: dict[str, type | tuple[type, ...]] = {"folded": (int, float), "folds": int}


def check_state(state: Mapping[str, Any], settings: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
    """Make sure that a state is whole and of this tracker.

    Args:
        state: What is to be loaded.
        settings: This tracker's values that it must have too.
        like: The tracker's tensors by key, with those of the window if the state has them.

    Raises:
        ValueError: If it is of other tracks, another clock, or another model, or not whole.
    """
    for key, value in settings.items():
        if state.get(key) != value:
            raise ValueError(
                f"the state's {key} is {state.get(key)!r}, this tracker's is {value!r}: build the"
                " PowerEMA with the settings of the run that is resumed"
            )
    given = {k: v for k, v in state.items() if k.startswith(("average.", "window."))}
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
    broken += [k for k, kind in _LATER_VALUES.items() if k in state and not isinstance(state[k], kind)]
    broken += [k for k, x in like.items() if _sharded_otherwise(x, given[k])]
    if broken or not _is_in_order(state, has_window=any(k.startswith("window.") for k in given)):
        raise ValueError(
            f"the state is not one that state_dict gave: {', '.join(broken) or 't'} is missing or wrong; load what"
            " this run's PowerEMA.state_dict() returned"
        )


def _is_in_order(state: Mapping[str, Any], *, has_window: bool) -> bool:
    folded = state.get("folded", state["t"])
    return bool(state["start"] <= folded <= state["t"] < math.inf and has_window == (folded < state["t"]))


def _sharded_otherwise(tensor: Tensor, given: Tensor) -> bool:
    return is_sharded(given) and local(tensor).shape != local(given).shape
