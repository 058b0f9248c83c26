"""Gradients that are not finite: found, set to 0, and reported.

Ref: EDM2 App. D.2; SPEC section 3.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from edm2.ema.tensors import is_sharded, local


@torch.no_grad()
def clean_gradients(gradients: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Undo the scaling of the loss and set non-finite gradients to 0, in place.

    Args:
        gradients: of all parameters; where they are sharded, every process calls this with its own.
        scale: what gradients are multiplied by first.

    Returns:
        Their L2 norm before the zeroing, a scalar tensor; non-finite if any element was.
    """
    parts = [local(g) for g in gradients]
    if scale != 1:
        torch._foreach_mul_(parts, scale)
    norm = _norm(gradients, parts)
    # The check is free on the CPU; elsewhere a pass over the gradients costs less than waiting for the answer.
    if norm.device.type != "cpu" or not torch.isfinite(norm):
        for part in parts:
            torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0, out=part)
    return norm


def _norm(gradients: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    norms = torch.stack(torch._foreach_norm(list(parts)))
    spread = [is_sharded(g) for g in gradients]
    if not any(spread):
        return torch.linalg.vector_norm(norms)
    sharded = torch.tensor(spread, device=norms.device)
    square = torch.where(sharded, norms, 0).square().sum()
    dist.all_reduce(square)
    return (square + torch.where(sharded, 0, norms).square().sum()).sqrt()
