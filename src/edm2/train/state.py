"""The state of a run as tensors by name, independent of the number of processes."""

from typing import Any

import torch
from torch import Tensor, nn

from edm2.ema import PowerEMA
from edm2.ema.tracking.sharding import is_sharded, like_shard, local
from edm2.train.checkpoint import StoredTensors, Tensors
from edm2.train.parallel import rows_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerEMA | None, *, is_first: bool, copy: bool
) -> tuple[Tensors, dict[str, Any]]:
    """What this process has to store: its rows of sharded tensors, and on the first process the other tensors.

    Args:
        model: The network.
        optimizer: Adam, after at least one step.
        ema: The averages, if this process has them.
        is_first: Whether this is the first process.
        copy: Whether to copy the tensors to host memory, so that training may go on while they are written.

    Returns:
        The tensors of `model`, `optimizer` (named `exp_avg.NAME` and so on) and `ema`, and the JSON values of the
        averages.
    """
    average = {} if ema is None else ema.state_dict()
    groups: dict[str, dict[str, Tensor]] = {
        "model": model.state_dict(),
        "optimizer": {
            f"{key}.{name}": value
            for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()
        },
        "ema": {key: value for key, value in average.items() if isinstance(value, Tensor)},
    }
    kept: Tensors = {}
    for group, tensors in groups.items():
        kept[group] = {}
        for name, tensor in tensors.items():
            part = local(tensor.detach())
            if part.numel() if is_sharded(tensor) else is_first:
                kept[group][name] = (
                    part.to("cpu", copy=True, memory_format=torch.contiguous_format) if copy else part
                )
    return kept, {key: value for key, value in average.items() if not isinstance(value, Tensor)}


@torch.no_grad()
def scatter(
    stored: StoredTensors,
    values: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: PowerEMA | None,
) -> None:
    """Load what `gather` stored, in place; each process reads its rows alone, one tensor at a time.

    Args:
        stored: The tensors of a checkpoint.
        values: JSON values of the averages.
        model: The network.
        optimizer: Adam.
        ema: The averages, if this process has them.

    Raises:
        KeyError: If a tensor is missing.
        ValueError: If a tensor has another shape.
    """

    def load(target: Tensor, group: str, name: str) -> None:
        found, part = stored.read(group, name, rows_of(target)), local(target)
        if found.shape != part.shape:
            raise ValueError(f"{name} has the shape {list(found.shape)}, here it is {list(part.shape)}")
        part.copy_(found)

    for name, target in model.state_dict().items():
        load(target, "model", name)
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        moments = {key: torch.zeros_like(p) for key in _MOMENTS}
        for key, target in moments.items():
            load(target, "optimizer", f"{key}.{name}")
        optimizer.state[p] = {"step": stored.read("optimizer", f"step.{name}").to(p.device), **moments}
    if ema is None:
        return
    state: dict[str, Any] = dict(values)
    for key in stored.names("ema"):
        template = _parameter_of(key, parameters)
        if template is None or not is_sharded(template):
            state[key] = stored.read("ema", key)
        else:
            state[key] = like_shard(stored.read("ema", key, rows_of(template)), template)
    ema.load_state_dict(state)


def _parameter_of(key: str, parameters: dict[str, nn.Parameter]) -> Tensor | None:
    """The parameter that a tensor of the averages belongs to: `offset.0.NAME`, for example."""
    while key:
        if key in parameters:
            return parameters[key]
        key = key.partition(".")[2]
    return None
