"""Networks from the descriptions in files, which come from anywhere.

Values are checked for type and size before anything is built from them, and the network is built on the meta device,
so that a damaged or hostile description costs neither time nor memory.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from edm2.diffusion.build import build_denoiser
from edm2.diffusion.denoiser import Denoiser
from edm2.diffusion.own_network import build_own_denoiser

_LARGEST_SIZE, _LARGEST_REAL = 1 << 20, 1e6
_MOST_LEVELS, _MOST_BLOCKS = 16, 1024
# Smallest value of each argument that is a whole number.
_INTS = {
    **dict.fromkeys(("label_dim", "cond_channels", "augment_dim", "logvar_channels"), 0),
    **dict.fromkeys(("img_channels", "model_channels", "channel_mult_noise", "channel_mult_emb"), 1),
    **dict.fromkeys(("num_blocks", "channels_per_head"), 1),
}
_LISTS = ("img_resolution", "channel_mult", "attn_resolutions")
_REALS = (
    *("sigma_data", "dropout", "clip_act"),
    *("res_balance", "attn_balance", "label_balance", "concat_balance"),
)
_TEXTS = ("config", "label_kind", "network_from")
_OWN_OPTIONS = {"network_from", "img_resolution", "img_channels", "label_dim", "config", "sigma_data"}
_ARGUMENTS = (*_INTS, *_LISTS, *_REALS, *_TEXTS)
_NOT_NONE = (
    *("img_resolution", "img_channels", "label_dim", "sigma_data", "config", "channel_mult", "num_blocks"),
)
# What building raises for values that are plausible one by one and do not go together.
_CANNOT_BE_BUILT = (TypeError, ValueError, RuntimeError, OverflowError, ArithmeticError)


def is_plausible(name: object, value: object) -> bool:
    """Whether a value can be that of an argument of `build_denoiser`; False for other names."""
    if name not in _ARGUMENTS:
        return False
    if value is None:
        return name not in _NOT_NONE
    if name == "img_resolution" and type(value) is int:
        return _is_size(value)
    if name in _LISTS:
        fits = isinstance(value, (list, tuple)) and all(map(_is_size, value))
        return fits and (len(value) == 2 if name == "img_resolution" else len(value) <= _MOST_LEVELS)  # type: ignore[arg-type]
    if name in _INTS:
        return _is_size(value) or (value == 0 and type(value) is int and _INTS[name] == 0)
    if name in _REALS:
        smallest = 1e-6 if name == "sigma_data" else 0.0
        return type(value) in (int, float) and (
            smallest <= value <= _LARGEST_REAL or (name == "clip_act" and value == math.inf)  # type: ignore[operator]
        )
    return type(value) is str


def build_from(
    options: Mapping[str, Any], *, num_tensors: int | None = None, device: torch.device | str = "meta"
) -> Denoiser:
    """Build a network from the description that a file holds.

    Args:
        options: `Denoiser.options`.
        num_tensors: Number of tensors that the file has for it; a network with more blocks is not built.
        device: Where the network is built; on the default, meta, it has no values. A network of the user's own is
            built on the CPU, because it may have tensors that are not in the file.

    Returns:
        The denoiser in eval mode.

    Raises:
        UnregisteredNetworkError: If a function of the user's own made the network, and was not registered.
        ValueError: If no network has such values, or they do not go together.
    """
    for name, value in options.items():
        if name in _ARGUMENTS and not is_plausible(name, value):
            raise ValueError(f"{name} = {shown(value)} does not describe a network")
    # Files that say "no bound" as None.
    options = {k: math.inf if k == "clip_act" and v is None else v for k, v in options.items()}
    if "network_from" in options:
        if options.keys() != _OWN_OPTIONS:
            raise ValueError(
                f"a network of the user's own has exactly the arguments {', '.join(sorted(_OWN_OPTIONS))}"
            )
        return build_own_denoiser(**options).eval()
    blocks = options.get("num_blocks", 1) * len(options.get("channel_mult", ()))
    if num_tensors is not None and num_tensors < blocks:
        raise ValueError("fewer tensors than its network has blocks")
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{blocks} blocks in the encoder are more than any network has")
    try:
        with torch.device(device):
            return build_denoiser(**options).eval()
    except _CANNOT_BE_BUILT as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(reason.splitlines()[0].removeprefix("build_denoiser() ")[:300]) from error


def check_info(info: Mapping[str, Any]) -> None:
    """Raise ValueError unless what a model says about itself, apart from its network, is of edm2's kinds."""
    rules: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("sigma_rel", "sigma_max"), _is_positive),
        "num_images": lambda x: _is_count(x) or (type(x) is float and _is_positive(x)),
        "expected_error": lambda x: type(x) in (int, float) and 0 <= x < math.inf,
        **dict.fromkeys(("data", "run_id", "license", "license_notice"), lambda x: isinstance(x, str)),
        "class_names": lambda x: type(x) is list and all(isinstance(name, str) for name in x),
        "source": lambda x: type(x) is dict and all(isinstance(text, str) for text in x.values()),
        "coding": lambda x: type(x) is dict,
        "objective": lambda x: x == "mean",
        "residual": _is_residual,
        "label_dropout": lambda x: type(x) is float and 0 <= x < 1,
        "ignores_labels": lambda x: type(x) is bool,
        "consistency": lambda x: type(x) is dict and _is_positive(x.get("sigma_max")),
    }
    for name, fits in rules.items():
        value = info.get(name)
        is_absent = name not in info or (value is None and name not in ("class_names", "coding", "source"))
        if not is_absent and not fits(value):
            raise ValueError(f"{name} = {shown(value)} is not a value that edm2 writes")


def _is_residual(value: Any) -> bool:
    return (
        type(value) is dict
        and isinstance(value.get("sha256"), str)
        and all(
            type(value.get(name)) is list and all(type(x) is float and low <= x <= 1e30 for x in value[name])
            for name, low in (("mean", -1e30), ("std", 1e-30))
        )
    )


def shown(value: object) -> str:
    """A value from a file, short and without control characters."""
    return repr(value)[:60] if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIZE


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
