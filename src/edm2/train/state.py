"""The state of a run as full tensors by name, independent of the number of processes."""

from typing import Any

import torch
from torch import Tensor, nn

from edm2.ema import PowerEMA
from edm2.train.checkpoint import Tensors
from edm2.train.parallel import copy_whole, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerEMA | None, *, keep: bool
) -> tuple[Tensors, dict[str, Any]]:
    """Copy the state to host memory; a collective call if tensors are sharded.

    Args:
        model: The network.
        optimizer: Adam, after at least one step.
        ema: The averages, if this process has them.
        keep: Whether this process keeps the tensors, or only takes part in gathering them.

    Returns:
        Copies of the tensors of `model`, `optimizer` (named `exp_avg.NAME` and so on) and `ema`, and the JSON
        values of the averages.
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
    copies: Tensors = {}
    for group, tensors in groups.items():
        copies[group] = {}
        for name, tensor in tensors.items():
            value = whole(tensor.detach())
            if keep:
                copies[group][name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies, {key: value for key, value in average.items() if not isinstance(value, Tensor)}


@torch.no_grad()
def scatter(
    tensors: Tensors,
    values: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: PowerEMA | None,
) -> None:
    """Load the result of `gather` in place; each process takes its part."""
    for name, target in model.state_dict().items():
        copy_whole(target, tensors["model"][name])
    for name, p in model.named_parameters():
        moments = {key: torch.zeros_like(p) for key in _MOMENTS}
        for key, target in moments.items():
            copy_whole(target, tensors["optimizer"][f"{key}.{name}"])
        step = tensors["optimizer"][f"step.{name}"].to(p.device)
        optimizer.state[p] = {"step": step, **moments}
    if ema is not None:
        ema.load_state_dict({**tensors["ema"], **values})
