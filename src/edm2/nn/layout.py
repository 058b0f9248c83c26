"""Memory layout of convolutions, which affects only their speed."""

import torch
from torch import nn

from edm2.nn.plain_layers import GroupNorm


def faster_channels_last(module: nn.Module) -> bool:
    """Whether a model runs faster channels last: all do except, on the CPU, those with PyTorch's group norm.

    There, the group norm of configs A and B is 2 to 8 times slower in that layout, more than the convolutions gain.
    """
    on_cpu = all(p.device.type == "cpu" for p in module.parameters())
    return not (on_cpu and any(isinstance(layer, (GroupNorm, nn.GroupNorm)) for layer in module.modules()))


def use_channels_last(module: nn.Module) -> None:
    """Store convolution weights channels last, which makes convolutions faster on most machines.

    Values do not change. Activations follow the layout of the input images.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
