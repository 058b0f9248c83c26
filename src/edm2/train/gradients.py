"""Gradients that are not finite: found, set to 0, and reported.

Ref: EDM2 App. D.2; SPEC section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from edm2.ema.tracking.tensors import local
from edm2.train.norms import total_norm


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
    norm = total_norm(gradients, parts)
    # The check is free on the CPU; elsewhere a pass over the gradients costs less than waiting for the answer.
    if norm.device.type != "cpu" or not torch.isfinite(norm):
        for part in parts:
            torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0, out=part)
    return norm
