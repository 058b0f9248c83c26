"""The network in an official pickle: its constructor's arguments and where its tensors lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.diffusion.description import build_from, is_plausible, shown
from edm2.interop.pickle_file import read_pickle, refusal
from edm2.interop.pickle_values import Record, StoredTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_PARTS, _DEEPEST_MODULE, _LONGEST_NAME = 100_000, 8, 100
# Constructor's arguments that official files have.
_ARGUMENTS = (
    "img_resolution", "img_channels", "label_dim", "sigma_data", "logvar_channels", "model_channels",
    "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks", "attn_resolutions",
    "channels_per_head", "label_balance", "concat_balance", "res_balance", "attn_balance", "dropout", "clip_act",
)  # fmt: skip
_WITHOUT_MEANING_HERE = ("use_fp16",)


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """What a network pickle holds, its tensors still in the file.

    Attributes:
        path: The file.
        options: Arguments for `edm2.diffusion.build_denoiser`.
        parameters: Name -> trained tensor.
        buffers: Name -> fixed tensor.
        encoder: Name of the class that encoded its training images, or None.
    """

    path: Path
    options: dict[str, Any]
    parameters: dict[str, StoredTensor]
    buffers: dict[str, StoredTensor]
    encoder: str | None

    def read_tensors(self) -> dict[str, Tensor]:
        """All tensors in their stored type.

        Raises:
            ValueError: If a value is not finite.
        """
        tensors = {name: stored.read() for name, stored in {**self.parameters, **self.buffers}.items()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise refusal(self.path, f"values of {broken[0]} that are not finite")
        return tensors


def read_network(path: str | Path) -> NetworkFile:
    """Read and check the description of an official pickle's network, without its tensors' values.

    Args:
        path: As in `load_network`.

    Raises:
        ValueError: As in `load_network`.
    """
    return network_of(Path(path), read_pickle(path))


def network_of(path: Path, content: Any) -> NetworkFile:
    """Do the work of `read_network` on the result of `read_pickle`."""
    network = content.get("ema") if type(content) is dict else None
    if not isinstance(network, Record):
        raise refusal(path, "no network under 'ema'")
    if network.class_name != "Precond":
        raise refusal(path, f"a network of class {network.class_name!r}, not the 'Precond' of EDM2")
    parameters: dict[str, StoredTensor] = {}
    buffers: dict[str, StoredTensor] = {}
    for kind, name, tensor in _tensors(path, network):
        (parameters if kind == "_parameters" else buffers)[name] = tensor
    encoder = content.get("encoder")
    return NetworkFile(
        path=path,
        options=_options(path, network, {**parameters, **buffers}),
        parameters=parameters,
        buffers=buffers,
        encoder=encoder.class_name if isinstance(encoder, Record) else None,
    )


def _tensors(path: Path, network: Record) -> Iterator[tuple[str, str, StoredTensor]]:
    """Every tensor with its kind and its name, module by module."""
    todo: list[tuple[str, Any]] = [("", network)]
    num_parts = 0
    while todo:
        prefix, module = todo.pop()
        if not isinstance(module, Record):
            raise refusal(path, f"a value {prefix[:-1]!r} in place of a module")
        parts = {kind: module.state.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")}
        for kind, items in parts.items():
            # Modules may be shared, so that a short file can spell out endless and very long names.
            num_parts += 1 + (len(items) if type(items) is dict else 0)
            if num_parts > _MOST_PARTS or prefix.count(".") > _DEEPEST_MODULE:
                raise refusal(path, "more modules than any network has")
            if type(items) is not dict or not all(_is_name(name) for name in items):
                raise refusal(path, f"a module {prefix[:-1]!r} whose {kind} have no plausible names")
            for name, value in items.items():
                if value is None:
                    continue
                if kind == "_modules":
                    todo.append((f"{prefix}{name}.", value))
                elif not isinstance(value, StoredTensor) or value.dtype not in _FLOATS:
                    raise refusal(path, f"a {prefix}{name} that is not a tensor of floats")
                else:
                    yield kind, prefix + name, value


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= _LONGEST_NAME


def _options(path: Path, network: Record, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Our constructor's arguments from those in the file, which have the same names, if its tensors fit them."""
    given = network.state.get("_init_kwargs")
    if type(given) is not dict or network.state.get("_init_args", ()) != ():
        raise refusal(path, "a network without its constructor's arguments by name")
    if "sigma_data" in network.state:
        given = {"sigma_data": network.state["sigma_data"], **given}
    options = {}
    for name, value in given.items():
        if name in _WITHOUT_MEANING_HERE or value is None:
            continue
        if name not in _ARGUMENTS or not is_plausible(name, value):
            raise refusal(
                path, f"a network with {str(name)[:40]!r} = {shown(value)}, which is not known here"
            )
        options[name] = value
    try:
        built = build_from(options, num_tensors=len(tensors))
    except ValueError as error:
        raise refusal(path, f"a network that cannot be built ({error})") from None
    wanted = {name: tuple(x.shape) for name, x in built.state_dict().items()}
    given = {name: x.shape for name, x in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            told = f"{_shape(given.get(name))} for {name}, where its network has {_shape(wanted.get(name))}"
            raise refusal(path, told)
    return built.options


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"a tensor of shape {list(shape)}"
