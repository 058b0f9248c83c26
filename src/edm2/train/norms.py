"""Norms over all of a network's weights together, whole or sharded, without waiting for the device."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from edm2.ema.tracking.sharding import is_sharded, local


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> Tensor:
    """Compute the joint L2 norm of many tensors; a collective call if some are sharded.

    Args:
        tensors: Weights, or their gradients.
        parts: Values to use instead, this process's part of one for each tensor.

    Returns:
        A scalar tensor.
    """
    norms = torch.stack(torch._foreach_norm([local(t) for t in tensors] if parts is None else list(parts)))
    spread = [is_sharded(t) for t in tensors]
    if not any(spread):
        whole: Tensor = torch.linalg.vector_norm(norms)
        return whole
    sharded = torch.tensor(spread, device=norms.device)
    square = torch.where(sharded, norms, 0).square().sum()
    dist.all_reduce(square)
    return (square + torch.where(sharded, 0, norms).square().sum()).sqrt()


class UpdateNorm:
    """Measures one update: the joint norm of all weights, and of their change.

    Args:
        weights: The parameters before the update; they are copied.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._before = [local(w.detach()).clone() for w in self._weights]

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the norms of the weights before the update and of their change, `[2]`; call it after the update."""
        changes = torch._foreach_sub([local(w.detach()) for w in self._weights], self._before)
        return torch.stack([total_norm(self._weights, self._before), total_norm(self._weights, changes)])
