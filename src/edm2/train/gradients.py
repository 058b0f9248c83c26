"""Non-finite gradients are set to 0 and reported.

Ref: EDM2 App. D.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from edm2.ema.tracking.sharding import local
from edm2.train.norms import total_norm


@torch.no_grad()
def clean_gradients(gradients: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Undo the loss scaling and set non-finite gradients to 0, in place.

    Args:
        gradients: Gradients of all parameters; if they are sharded, every process passes its own.
        scale: Factor on the gradients, applied first.

    Returns:
        Their L2 norm before elements are set to 0, a scalar tensor; non-finite if any element was.
    """
    parts = [local(g) for g in gradients]
    if scale != 1:
        torch._foreach_mul_(parts, scale)
    norm = total_norm(gradients, parts)
    # The check is free on the CPU; elsewhere a pass over the gradients costs less than synchronising.
    if norm.device.type != "cpu" or not torch.isfinite(norm):
        for part in parts:
            torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0, out=part)
    return norm


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients down, in place, to a joint L2 norm of at most `largest`, without waiting for the device.

    Args:
        gradients: What `clean_gradients` was given.
        norm: What it returned; where that is not finite, nothing is scaled.
        largest: Above 0.
    """
    factor = torch.where(torch.isfinite(norm), (largest / norm.clamp(min=1e-30)).clamp(max=1.0), 1.0)
    torch._foreach_mul_([local(g) for g in gradients], factor)
