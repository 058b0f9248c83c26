"""Whether the description in a file can be that of a network: files come from anywhere.

Values are checked for type and size before anything is built from them, so that a damaged or hostile description
costs neither time nor memory.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from edm2.diffusion.denoiser import Denoiser

_MOST_LEVELS = 16
_LARGEST_SIDE = 1 << 13
# Constructor argument -> smallest and largest value that is believed.
_INTS = {
    "img_channels": (1, 1 << 10),
    "label_dim": (0, 1 << 20),
    "model_channels": (1, 1 << 13),
    "channel_mult_noise": (1, 64),
    "channel_mult_emb": (1, 64),
    "num_blocks": (1, 64),
    "channels_per_head": (1, 1 << 13),
    "cond_channels": (0, 1 << 10),
    "augment_dim": (0, 1 << 10),
    "logvar_channels": (1, 1 << 16),
    "channels_per_group": (1, 1 << 16),
}
_LISTS = {"channel_mult": 64, "attn_resolutions": _LARGEST_SIDE}
_REALS = (
    "sigma_data",
    "dropout",
    "clip_act",
    "init_bound",
    "res_balance",
    "attn_balance",
    "label_balance",
    "concat_balance",
)
_TEXTS = ("config", "label_kind", "fp32_attention")
_FLAGS = ("eps_inside_root", "middle_pixel_norm")
_NOT_NONE = ("img_resolution", "img_channels", "label_dim", "sigma_data", "config", "channel_mult")
_LARGEST_REAL = 1e6
# What building raises for values that are plausible one by one and do not go together.
_CANNOT_BE_BUILT = (TypeError, ValueError, RuntimeError, OverflowError, ArithmeticError)


def is_plausible(name: object, value: object) -> bool:
    """Whether a value can be that of an argument of `Denoiser`; False for names that are none of its arguments."""
    if value is None:
        return name not in _NOT_NONE
    if name in _INTS:
        low, high = _INTS[name]
        return type(value) is int and low <= value <= high
    if name == "img_resolution":
        return _are_sizes([value] if type(value) is int else value, _LARGEST_SIDE)
    if name in _LISTS:
        return _are_sizes(value, _LISTS[name])
    if name in _REALS:
        smallest = 1e-6 if name == "sigma_data" else 0.0
        return type(value) in (int, float) and smallest <= value <= _LARGEST_REAL  # type: ignore[operator]
    return type(value) is (str if name in _TEXTS else bool) and name in (*_TEXTS, *_FLAGS)


def build_on_meta(network: Mapping[str, Any], *, num_tensors: int | None = None) -> Denoiser:
    """Build a network without values from the description that a file holds.

    Args:
        network: arguments of `Denoiser`.
        num_tensors: tensors that the file has for it; a network of more blocks is not built.

    Returns:
        The denoiser in eval mode, on the meta device.

    Raises:
        ValueError: for values that no network has, or that do not go together.
    """
    for name, value in network.items():
        known = name in (*_INTS, *_LISTS, *_REALS, *_TEXTS, *_FLAGS, "img_resolution")
        if known and not is_plausible(name, value):
            raise ValueError(f"{name} = {shown(value)} is nothing that a network has")
    if num_tensors is not None and num_tensors < network.get("num_blocks", 1) * len(
        network.get("channel_mult", ())
    ):
        raise ValueError("fewer tensors than its network has blocks")
    try:
        with torch.device("meta"):
            return Denoiser(**network).eval()
    except _CANNOT_BE_BUILT as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(reason.splitlines()[0].removeprefix("Denoiser.__init__() ")[:300]) from error


def check_info(info: Mapping[str, Any]) -> None:
    """Raise ValueError unless what a model says about itself beside its network is of the kinds that edm2 writes."""
    rules: dict[str, Callable[[Any], bool]] = {
        "sigma_rel": _is_positive,
        "num_images": lambda x: _is_count(x) or (type(x) is float and _is_positive(x)),
        "expected_error": lambda x: type(x) in (int, float) and 0 <= x < math.inf,
        **dict.fromkeys(("data", "run_id", "license", "license_notice"), lambda x: isinstance(x, str)),
        "class_names": lambda x: type(x) is list and all(isinstance(name, str) for name in x),
        "source": lambda x: type(x) is dict and all(isinstance(text, str) for text in x.values()),
        "coding": lambda x: type(x) is dict,
    }
    for name, fits in rules.items():
        value = info.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{name} = {shown(value)} is nothing that edm2 writes")


def read_json(text: str | bytes) -> Any:
    """Parse JSON from elsewhere.

    Raises:
        ValueError: whatever is wrong with it; the parser itself has another error for deep nesting.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("values nested too deep") from None


def shown(value: object) -> str:
    """A value from a file for a message: short, and without what a terminal would obey."""
    return repr(value)[:60] if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"


def _are_sizes(value: object, largest: int) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) > _MOST_LEVELS:
        return False
    return all(type(size) is int and 1 <= size <= largest for size in value)


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
