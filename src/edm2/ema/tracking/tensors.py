"""Which tensors of a model are averaged, which are copied, and under what names."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edm2.ema.storage.tensorfile import DTYPES
from edm2.ema.tracking.sharding import is_sharded, local
from edm2.ema.tracking.wrappers import modules_by_clean_name, refuse_empty_shard

Include = Callable[[str, Tensor], bool]
Tensors = Mapping[str, Any] | Sequence[Any]
"""Tensors in dicts, lists, tuples, named tuples, dataclasses and modules, nested at will."""
Path = tuple[Callable[[Any], Any], ...]
"""What leads from the outermost object to a tensor, one step after the other."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Place in a model where a tensor is found anew each time, also after it or what holds it was replaced."""

    name: str
    owner: Any
    path: Path

    def get(self) -> Tensor:
        """The tensor that is there now.

        Raises:
            ValueError: If there is none any more.
        """
        tensor = self.owner
        try:
            for step in self.path:
                tensor = step(tensor)
        except (KeyError, IndexError, AttributeError, TypeError):
            tensor = None
        if tensor is None:
            raise ValueError(
                f"tensor {self.name!r} is no longer in the model: the averages need the tensors they were"
                " made for; build a new PowerEMA after changing a model"
            )
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{self.name!r} is a {type(tensor).__name__} now: the averages need a tensor where there was one when"
                " PowerEMA was made"
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """The chosen tensors of a model, each once.

    Attributes:
        averaged: Floating-point and complex parameters, and buffers where asked for.
        copied: All others that `state_dict` holds.
        aliases: Other names of tied tensors -> the name under which they are kept.
    """

    averaged: tuple[Slot, ...]
    copied: tuple[Slot, ...]
    aliases: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user wants of a model's tensors.

    Attributes:
        include: Called with each name and tensor; returns whether to average it. None: all.
        copied: Names of tensors that are copied instead of averaged, or a function that says so.
        average_buffers: Floating-point buffers are averaged too.
    """

    include: Include | None = None
    copied: Include | Collection[str] = ()
    average_buffers: bool = False

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor takes part."""
        return self.include is None or self.include(name, tensor)

    def averages(self, name: str, tensor: Tensor, *, is_buffer: bool) -> bool:
        """Whether a tensor that takes part is averaged."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or (
            is_buffer and not self.average_buffers
        ):
            return False
        return not (self.copied(name, tensor) if callable(self.copied) else name in self.copied)


def is_unfinished(model: nn.Module | Tensors) -> bool:
    """Whether a model has lazy parameters whose shapes the first batch will tell."""
    return isinstance(model, nn.Module) and any(is_lazy(p) for p in [*model.parameters(), *model.buffers()])


def collect(model: nn.Module | Tensors, choice: Choice) -> ModelTensors:
    """Find the tensors of a model that an average is about.

    Args:
        model: Any module, wrapped or not, or tensors by name.
        choice: Which of them.

    Returns:
        The chosen tensors; tied ones once.

    Raises:
        ValueError: If two tensors get one name, nothing is chosen, a name in `copied` is unknown, or a tensor has no
            storage or a type that cannot be stored.
    """
    averaged: list[Slot] = []
    copied: list[Slot] = []
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, owner, path, tensor, is_buffer in _all_places(model):
        if not choice.takes(name, tensor) or found.get(name) is tensor:
            continue
        if name in found:
            raise ValueError(
                f"two tensors are called {name!r} once wrappers' prefixes are removed: rename one"
            )
        found[name] = tensor
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        is_averaged = choice.averages(name, tensor, is_buffer=is_buffer)
        _refuse_unfit(name, tensor, is_averaged=is_averaged)
        first_name[id(tensor)] = name
        (averaged if is_averaged else copied).append(Slot(name=name, owner=owner, path=path))
    if not averaged:
        raise ValueError(
            "no floating-point parameter was chosen: check include= and that the model has parameters"
        )
    unknown = [] if callable(choice.copied) else sorted(set(choice.copied) - set(found))
    if unknown:
        raise ValueError(
            f"copied={unknown} are not tensors of the model: its first names are {_listed([*found])}"
        )
    return ModelTensors(averaged=tuple(averaged), copied=tuple(copied), aliases=aliases)


def _refuse_unfit(name: str, tensor: Tensor, *, is_averaged: bool) -> None:
    refuse_empty_shard(name, tensor)
    if is_lazy(tensor) or tensor.is_meta:
        kind = "lazy and has no shape yet" if is_lazy(tensor) else "on the meta device"
        raise ValueError(
            f"tensor {name!r} is {kind}: give the model its tensors first, or leave it out with include="
        )
    if tensor.dtype not in DTYPES.values() and not (tensor.is_complex() and is_averaged):
        raise ValueError(
            f"tensor {name!r} is of type {tensor.dtype}, which snapshots cannot hold: leave it out with include="
        )


def check_names(given: Iterable[str], tracked: Iterable[str]) -> None:
    """Refuse a model whose averaged tensors have other names than those tracked.

    Raises:
        ValueError: If names differ.
    """
    given, tracked = set(given), set(tracked)
    missing, extra = sorted(tracked - given), sorted(given - tracked)
    if missing or extra:
        raise ValueError(
            f"the model has other tensors than those tracked: missing {_listed(missing)}, unexpected {_listed(extra)};"
            " build a new PowerEMA after changing a model"
        )


def check_same(now: ModelTensors, tracked: ModelTensors) -> None:
    """Refuse a model in which a tracked tensor has given way to another one.

    Raises:
        ValueError: If one has.
    """
    check_names((slot.name for slot in now.averaged), (slot.name for slot in tracked.averaged))
    found = {slot.name: slot.get() for slot in (*now.averaged, *now.copied)}
    for slot in (*tracked.averaged, *tracked.copied):
        if found.get(slot.name) is not slot.get():
            raise ValueError(
                f"tensor {slot.name!r} in the model is not the tracked one: its module was replaced"
                " after PowerEMA was built; build a new PowerEMA, and only once the model is complete"
            )


def _listed(names: Sequence[str]) -> str:
    return (", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")) or "none"


_Place = tuple[str, Any, Path, Tensor, bool]


def _all_places(model: nn.Module | Tensors) -> Iterator[_Place]:
    """Name, outermost object, path from it, tensor, and whether it is a buffer, of each tensor."""
    if isinstance(model, nn.Module):
        yield from _of_module("", model)
    else:
        yield from _of_tree("", model, (), model)


def _of_module(before: str, model: nn.Module) -> Iterator[_Place]:
    for prefix, module in modules_by_clean_name(model):
        dot = f"{before}{prefix}." if prefix else before
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + key, module._parameters, (itemgetter(key),), parameter, False
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield dot + key, module._buffers, (itemgetter(key),), buffer, True


def _of_tree(before: str, root: Any, path: Path, tree: Any) -> Iterator[_Place]:
    if isinstance(tree, Mapping):
        steps: list[tuple[Any, Callable[[Any], Any]]] = [(key, itemgetter(key)) for key in tree]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        steps = [(name, attrgetter(name)) for name in tree._fields]
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        steps = [(i, itemgetter(i)) for i in range(len(tree))]
    elif is_dataclass(tree) and not isinstance(tree, type):
        steps = [(field.name, attrgetter(field.name)) for field in fields(tree)]
    else:
        raise ValueError(
            f"the model holds a {type(tree).__name__} at {before.rstrip('.') or 'its top'!r}: give a module, or dicts,"
            " lists, tuples and dataclasses of tensors and modules"
        )
    for key, step in steps:
        value = step(tree)
        if isinstance(value, Tensor):
            yield f"{before}{key}", root, (*path, step), value, False
        elif isinstance(value, nn.Module):
            yield from _of_module(f"{before}{key}.", value)
        elif value is not None:
            yield from _of_tree(f"{before}{key}.", root, (*path, step), value)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of its real and imaginary parts; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


_kind = attrgetter("shape", "device", "dtype")  # in one call, as it is asked of every tensor at every update


class FollowedModel:
    """The averaged and the copied tensors of a model.

    Args:
        model: A module or tensors by name.
        choice: Which of its tensors take part.

    Attributes:
        model: The model.
        names: Names of the averaged tensors.
        complex_names: Those of them that are complex, and averaged as real and imaginary parts.
        aliases: Other names of tied tensors -> the name under which they are kept.
        is_sharded: Whether averaged tensors are spread over processes.

    Raises:
        ValueError: If the model cannot be followed; see `collect`.
    """

    def __init__(self, model: nn.Module | Tensors, choice: Choice) -> None:
        self.model, self._choice = model, choice
        self._slots = collect(model, choice)
        self._now = [slot.get() for slot in self._slots.averaged]
        self._kinds = [*map(_kind, self._now)]
        self.names = [slot.name for slot in self._slots.averaged]
        self.complex_names = [n for n, x in zip(self.names, self._now, strict=True) if x.is_complex()]
        self.aliases = self._slots.aliases
        self.is_sharded = any(is_sharded(x) for x in self._now)

    @property
    def templates(self) -> list[Tensor]:
        """The averaged tensors as last seen, complex ones as real and imaginary parts."""
        return [real(x) for x in self._now] if self.complex_names else self._now

    @property
    def weights(self) -> list[Tensor]:
        """Local parts of `templates`."""
        return [local(x) for x in self.templates] if self.is_sharded else self.templates

    def read(self) -> bool:
        """Find the tensors anew.

        Returns:
            Whether one of them changed its device or type.

        Raises:
            ValueError: If one went away or changed its shape.
        """
        now = [slot.get() for slot in self._slots.averaged]
        kinds = [*map(_kind, now)]
        moved = kinds != self._kinds
        if moved:
            for name, new, old in zip(self.names, kinds, self._kinds, strict=True):
                if new[0] != old[0]:
                    raise ValueError(
                        f"tensor {name!r} changed from shape {tuple(old[0])} to {tuple(new[0])}: an average needs the"
                        " same tensors throughout; build a new PowerEMA, and only once the model is complete"
                    )
            if any(is_sharded(x) for x in now) != self.is_sharded:
                raise ValueError(
                    "the model was sharded over processes after PowerEMA was built: build PowerEMA after fully_shard"
                )
        self._now, self._kinds = now, kinds
        return moved

    def check_unchanged(self) -> None:
        """Make sure that the model still holds the tensors that are followed.

        Raises:
            ValueError: If a module was replaced, added or removed.
        """
        check_same(collect(self.model, self._choice), self._slots)

    def copied(self) -> dict[str, Tensor]:
        """The tensors that are copied, not averaged, by name."""
        return {slot.name: slot.get() for slot in self._slots.copied}

    def weights_of(self, model: nn.Module | Tensors) -> list[Tensor]:
        """Local averaged tensors of this model or of another one like it.

        Raises:
            ValueError: If the model has other tensors.
        """
        if model is self.model:
            self.check_unchanged()
        given = {slot.name: slot.get() for slot in collect(model, self._choice).averaged}
        check_names(given, self.names)
        found = [local(real(given[name])) for name in self.names]
        for name, weight, mine in zip(self.names, found, self.weights, strict=True):
            if weight.shape != mine.shape:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(weight.shape)} in the model, its average {tuple(mine.shape)}:"
                    " the averages fit the tracked model, or one made and spread over processes like it"
                )
        return found

    def copied_pairs(self, model: nn.Module | Tensors) -> Iterator[tuple[Tensor, Tensor]]:
        """Copied tensors of another model like this one, each with this model's."""
        mine = self.copied()
        for slot in collect(model, self._choice).copied:
            yield slot.get(), mine[slot.name]

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole averaged tensors by name; complex ones complex again."""
        named = dict(zip(self.names, tensors, strict=True))
        return named | {name: torch.view_as_complex(named[name].contiguous()) for name in self.complex_names}
