"""Which tensors of a module are averaged, which are copied, and under what clean names."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edm2.ema.storage.tensorfile import DTYPES

Include = Callable[[str, Tensor], bool]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_name(name: str) -> str:
    """Name of a tensor without what DDP, FSDP, torch.compile and checkpointing put into it."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = _WRAPPERS.sub("", name.removeprefix("module."))
    return name


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Place in a module where a tensor is found anew each time, also after it was replaced."""

    name: str
    owner: dict[str, Tensor | None]
    key: str

    def get(self) -> Tensor:
        """The tensor that is there now.

        Raises:
            ValueError: If there is none any more.
        """
        tensor = self.owner.get(self.key)
        if tensor is None:
            raise ValueError(
                f"tensor {self.name!r} is no longer in the model: the averages need the tensors they were"
                " made for; build a new PowerEMA after changing a model"
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class ModuleTensors:
    """The chosen tensors of a module, each once.

    Attributes:
        averaged: Floating-point parameters.
        copied: Buffers that `state_dict` holds, and parameters that are not floating point.
        aliases: Other names of tied tensors -> the name under which they are kept.
    """

    averaged: tuple[Slot, ...]
    copied: tuple[Slot, ...]
    aliases: dict[str, str]


def collect(model: nn.Module, include: Include | None = None) -> ModuleTensors:
    """Find the tensors of a module that an average is about.

    Args:
        model: Any module, wrapped or not.
        include: Called with the clean name and the tensor, of parameters and buffers; says which
            take part. Default: all parameters and all buffers of `state_dict`.

    Returns:
        The chosen tensors; tied ones once.

    Raises:
        ValueError: If two tensors get one name, nothing is chosen, or one has no storage or is of a type that
            cannot be averaged or stored.
    """
    averaged: list[Slot] = []
    copied: list[Slot] = []
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    names: set[str] = set()
    for name, owner, key, is_parameter in _all_places(model):
        tensor = owner[key]
        if tensor is None or (include is not None and not include(name, tensor)):
            continue
        if name in names:
            raise ValueError(
                f"two tensors are called {name!r} once wrappers' prefixes are removed: rename one"
            )
        names.add(name)
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        if tensor.is_complex() or tensor.is_meta:
            kind = "complex" if tensor.is_complex() else "on the meta device"
            raise ValueError(
                f"tensor {name!r} is {kind}, which cannot be averaged: leave it out with include="
            )
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"tensor {name!r} is of type {tensor.dtype}, which snapshots cannot hold: leave it out with include="
            )
        first_name[id(tensor)] = name
        slot = Slot(name=name, owner=owner, key=key)
        (averaged if is_parameter and tensor.is_floating_point() else copied).append(slot)
    if not averaged:
        raise ValueError(
            "no floating-point parameter was chosen: check include= and that the model has parameters"
        )
    return ModuleTensors(averaged=tuple(averaged), copied=tuple(copied), aliases=aliases)


def check_names(given: Iterable[str], tracked: Iterable[str]) -> None:
    """Refuse a model whose averaged tensors have other names than those tracked."""
    given, tracked = set(given), set(tracked)
    missing, extra = sorted(tracked - given), sorted(given - tracked)
    if missing or extra:
        raise ValueError(
            f"the model has other tensors than those tracked: it lacks {_listed(missing)}, and has {_listed(extra)}"
            " besides; build a new PowerEMA after changing a model"
        )


def check_same(now: ModuleTensors, tracked: ModuleTensors) -> None:
    """Refuse a model in which a tracked tensor has given way to another one."""
    check_names((slot.name for slot in now.averaged), (slot.name for slot in tracked.averaged))
    found = {slot.name: slot.get() for slot in (*now.averaged, *now.copied)}
    for slot in (*tracked.averaged, *tracked.copied):
        if found.get(slot.name) is not slot.get():
            raise ValueError(
                f"tensor {slot.name!r} in the model is not the one that is followed: its module was replaced"
                " after PowerEMA was built; build a new PowerEMA, and only once the model is whole"
            )


def _listed(names: Sequence[str]) -> str:
    return (", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")) or "none"


def _all_places(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, bool]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key in module._parameters:
            yield clean_name(dot + key), module._parameters, key, True
        for key in module._buffers:
            if key not in module._non_persistent_buffers_set:
                yield clean_name(dot + key), module._buffers, key, False


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without loading torch.distributed where nobody uses it."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def like_shard(part: Tensor, template: Tensor) -> Tensor:
    """A sharded tensor laid out like `template` whose local part is `part`."""
    from torch.distributed.tensor import DTensor

    assert isinstance(template, DTensor)
    return DTensor.from_local(
        part.to(template.device),
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def shard_of(tensor: Tensor, template: Tensor) -> Tensor:
    """The local part of a tensor that is sharded like `template`, or whole: then a collective call spreads it."""
    if is_sharded(tensor) or not is_sharded(template):
        return local(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(template, DTensor)
    return local(distribute_tensor(tensor.to(template.device), template.device_mesh, template.placements))


def full(part: Tensor, template: Tensor) -> Tensor:
    """The whole of a tensor from the local part, a collective call where `template` is sharded."""
    if not is_sharded(template):
        return part
    return torch.Tensor.detach(like_shard(part, template).full_tensor())  # type: ignore[attr-defined]
