"""Gradients that are not finite: found, set to 0, and reported.

Ref: EDM2 App. D.2; SPEC section 3.
"""

import torch
from torch import Tensor


@torch.no_grad()
def clean_gradients(gradients: list[Tensor]) -> Tensor:
    """Set non-finite gradients to 0, in place.

    Returns:
        Their L2 norm as it was before, a scalar tensor; non-finite if any element was.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # The check is free on the CPU; elsewhere a pass over the gradients costs less than waiting for the answer.
    if norm.device.type != "cpu" or not torch.isfinite(norm):
        for gradient in gradients:
            torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
    return norm
