"""Magnitudes of a model's activations, weights, gradients and updates during training.

Ref: EDM2 Sec. 2 and Fig. 3: the configurations remove drifting magnitudes one by one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Root mean squares of one training step.

    Attributes:
        activations: RMS of each block's output, over batch, channels and pixels.
        weights: RMS of each weight before the update.
        gradients: RMS of each weight's gradient.
        updates: L2 norm of each weight's change, relative to that of the weight.
    """

    activations: dict[str, float]
    weights: dict[str, float]
    gradients: dict[str, float]
    updates: dict[str, float]


class MagnitudeRecorder:
    """Measures single training steps of any model; between steps, nothing is attached to it.

    Args:
        model: Any module whose parameters are not sharded.
        blocks: Chooses the modules whose outputs are measured, by name and module; the model itself has the name ""
            and is reported under its class. Default: the members of module lists, dictionaries and sequences, where
            networks usually keep their blocks; in a model without them, the modules without children.

    Raises:
        ValueError: If nothing is chosen.

    Example:
        >>> recorder = MagnitudeRecorder(model)
        >>> with recorder.step():
        ...     loss(model, batch).backward()
        ...     optimizer.step()
        >>> recorder.read().activations
    """

    def __init__(self, model: nn.Module, *, blocks: Callable[[str, nn.Module], bool] | None = None) -> None:
        self._blocks = _chosen(model, blocks)
        if not self._blocks:
            raise ValueError("no module of the model was chosen: let `blocks` accept at least one")
        self._model = model
        self._names: list[str] = []
        self._squares: dict[str, list[Tensor]] = {}
        self._last: list[Tensor] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the enclosed step: one or more forward and backward passes, and the update.

        Gradients must still exist at the end. The enclosed code must run the modules themselves: a graph that was
        compiled before does not see the hooks.
        """
        self._squares, self._last = {}, None
        # Vectors and scalars (biases, gains) are not measured. Looked up anew, since loading may replace parameters.
        named = {n: p for n, p in self._model.named_parameters() if p.ndim >= 2 and p.requires_grad}
        self._names = list(named)
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in self._blocks.items()]
        before = [p.detach().clone() for p in named.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._last = self._measure(list(named.values()), before)

    def read(self) -> Magnitudes:
        """The last recorded step; waits for the device.

        Raises:
            ValueError: If no step was recorded, or no chosen block ran in it.
        """
        if self._last is None:
            raise ValueError("no step was recorded: run one inside `with recorder.step():`")
        if not self._squares:
            raise ValueError(
                "no chosen module ran and gave a tensor in the recorded step: compiled graphs bypass the hooks"
            )
        names = (list(self._squares), self._names, self._names, self._names)
        parts = [
            dict(zip(own, values.tolist(), strict=True))
            for own, values in zip(names, self._last, strict=True)
        ]
        return Magnitudes(activations=parts[0], weights=parts[1], gradients=parts[2], updates=parts[3])

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.numel():
                square = _square_sum(tensor.detach()) / tensor.numel()
                self._squares.setdefault(name, []).append(square)

        return hook

    @torch.no_grad()
    def _measure(self, weights: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        norms = _norms(before)
        root = norms.new_tensor([max(p.numel(), 1) ** 0.5 for p in weights])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        changes = _norms([p - old for p, old in zip(weights, before, strict=True)])
        squares = [torch.stack(values).mean() for values in self._squares.values()]
        return [
            torch.stack(squares).sqrt() if squares else norms.new_zeros(0),
            norms / root,
            _norms(gradients) / root,
            changes / norms.clamp_min(torch.finfo(torch.float32).tiny),
        ]


def _chosen(model: nn.Module, blocks: Callable[[str, nn.Module], bool] | None) -> dict[str, nn.Module]:
    if blocks is not None:
        return {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if blocks(name, module)
        }
    named = {name: module for name, module in model.named_modules() if name} or {type(model).__name__: model}
    lists = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
    members = {
        id(child) for module in model.modules() if isinstance(module, lists) for child in module.children()
    }
    chosen = {
        name: module
        for name, module in named.items()
        if id(module) in members and not isinstance(module, lists) and any(True for _ in module.parameters())
    }
    # Only outermost blocks: a block within a block would be drawn twice.
    outer = {n: m for n, m in chosen.items() if not any(n.startswith(f"{other}.") for other in chosen)}
    return outer or {n: m for n, m in named.items() if not any(True for _ in m.children())}


def _norms(tensors: list[Tensor]) -> Tensor:
    # A model may have no trained matrix.
    squares = [_square_sum(t) for t in tensors]
    return torch.stack(squares).sqrt() if squares else torch.zeros(0)


def _square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares in float32 at least, where float16 would overflow."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    if values.is_complex():
        values = torch.view_as_real(values)
    # Not torch's vector_norm: in float32 on the CPU it is off by 1e-5 for a million values, 4e-4 for ten.
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() or output.is_complex() else None
    if dataclasses.is_dataclass(output):
        output = vars(output)
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    )
    return next((t for t in map(_first_tensor, values) if t is not None), None)
