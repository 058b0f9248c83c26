"""A network for sampling only, whose weights are normalised once instead of in every evaluation."""

import copy
from typing import Any

import torch
from torch import Tensor

from edm2.diffusion import Denoiser
from edm2.nn import NormalizedConv, UNet
from edm2.nn.blocks import Block
from edm2.nn.fast import FixedConv, FoldedConv, can_fold, weight_of

# Layers that are called with a gain -> parameter of the parent that holds the gain.
_GAINS = {"emb_linear": "emb_gain", "out_conv": "out_gain"}


class SamplingNetwork:
    """A copy of a denoiser with fixed weights, in its precision.

    Args:
        denoiser: The original, which is not changed.
        compile: Whether to use torch.compile; the first evaluation then takes minutes.
        fold: Whether blocks of config G take the fast form, see `edm2.nn.fast`, which is not for compilers and
            exports. Otherwise values are equal to the original's bit for bit.

    Attributes:
        module: The copy.
    """

    def __init__(self, denoiser: Denoiser, *, compile: bool = False, fold: bool = True) -> None:
        self._original = denoiser
        self.module = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self._fixed: dict[str, FixedConv] = {}
        if isinstance(denoiser.unet, UNet):
            for name, layer in denoiser.named_modules():
                if isinstance(layer, NormalizedConv) and name.startswith("unet."):
                    parent, _, own = name.rpartition(".")
                    block = denoiser.get_submodule(parent)
                    folded = fold and not compile and isinstance(block, Block) and can_fold(block)
                    weight = _weight(denoiser, name, folded=folded)
                    self._fixed[name] = FoldedConv(weight) if folded else FixedConv(weight)
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
            fixed = self._fixed[layer]
            weight = _weight(self._original, layer, folded=type(fixed) is FoldedConv)
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
def _weight(denoiser: Denoiser, name: str, *, folded: bool) -> Tensor:
    parent, _, own = name.rpartition(".")
    module: Any = denoiser.get_submodule(parent)
    if folded:
        return weight_of(module, own).to(denoiser.dtype)
    gain = getattr(module, _GAINS.get(own, ""), None)
    weight: Tensor = getattr(module, own).effective_weight(1.0 if gain is None else gain)
    return weight.to(denoiser.dtype)
