"""A model whose tensors are read anew at every update, as frameworks replace tensors and move models."""

from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from edm2.ema.tracking.sharding import is_sharded, local
from edm2.ema.tracking.tensors import Choice, Tensors, check_names, check_same, collect, real

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
