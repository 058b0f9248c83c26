"""A network for sampling only, whose weights are normalised once instead of in every evaluation."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edm2.diffusion import Denoiser
from edm2.nn import NormalizedConv, UNet
from edm2.nn.layers import apply_weight

# Layers that are called with a gain -> parameter of the parent that holds the gain.
_GAINS = {"emb_linear": "emb_gain", "out_conv": "out_gain"}


class FixedConv(nn.Module):
    """A `NormalizedConv` with a given effective weight, which includes the gain."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """As in `NormalizedConv`, bit for bit; the weight already includes the gain."""
        return apply_weight(x, self.weight.to(x.dtype))


class SamplingNetwork:
    """A copy of a denoiser with fixed weights, in its precision.

    Args:
        denoiser: The original, which is not changed.
        compile: Whether to use torch.compile; the first evaluation then takes minutes.

    Attributes:
        module: The copy.
    """

    def __init__(self, denoiser: Denoiser, *, compile: bool = False) -> None:
        self._original = denoiser
        self.module = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self._fixed: dict[str, FixedConv] = {}
        for name, layer in list(self.module.named_modules()):
            if (
                isinstance(layer, NormalizedConv)
                and name.startswith("unet.")
                and isinstance(denoiser.unet, UNet)
            ):
                parent, _, own = name.rpartition(".")
                self._fixed[name] = FixedConv(_effective_weight(denoiser, name))
                setattr(self.module.get_submodule(parent), own, self._fixed[name])
        self._forward: Any = torch.compile(self.module) if compile else self.module

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the original's current weights and precision."""
        self.module.dtype = self._original.dtype
        state = self.module.state_dict()
        for name, tensor in self._original.state_dict().items():
            layer = name.removesuffix(".weight")
            if layer not in self._fixed:
                state[name].copy_(tensor)
                continue
            weight, fixed = _effective_weight(self._original, layer), self._fixed[layer]
            if fixed.weight.dtype == weight.dtype:
                fixed.weight.copy_(weight)
            else:
                fixed.weight = weight

    def to(self, device: torch.device | str) -> None:
        """Move the copy to a device; the original stays where it is."""
        self.module.to(device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, as the denoiser does."""
        return self._forward(*args, **kwargs)


@torch.no_grad()
def _effective_weight(denoiser: Denoiser, name: str) -> Tensor:
    layer = denoiser.get_submodule(name)
    assert isinstance(layer, NormalizedConv)
    parent, _, own = name.rpartition(".")
    gain = getattr(denoiser.get_submodule(parent), _GAINS.get(own, ""), None)
    return layer.effective_weight(1.0 if gain is None else gain).to(denoiser.dtype)
