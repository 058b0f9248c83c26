"""Fourier features, and magnitude-preserving convolutions and linear maps.

Ref: EDM2 Sec. 2.2-2.3, App. B.3-B.7.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.nn.functional import normalize, rms

EPS = 1e-4  # added to the RMS of weights, as in the released networks


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """`scale * torch.randn(shape)`; on the meta device, without a second of imports that serve to draw nothing."""
    x = torch.empty(shape)
    return x if x.is_meta else scale * x.normal_()


def uniform(*shape: int, low: float = 0.0, high: float = 1.0, scale: float = 1.0) -> Tensor:
    """`scale` times uniform random numbers in [low, high); see `normal`."""
    x = torch.empty(shape)
    return x if x.is_meta else scale * x.uniform_(low, high)


class Fourier(nn.Module):
    """Random Fourier features of a scalar: `cos(f x + p)`.

    `freqs` and `phases` are fixed buffers, saved with the model and never trained.

    Args:
        num_channels: Number of features.
        bandwidth: Standard deviation of the frequencies, in cycles per unit of the input.

    Ref: EDM2 App. B.3.
    """

    freqs: Tensor
    phases: Tensor
    amplitude = 1.0

    def __init__(self, num_channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", normal(num_channels, scale=2 * math.pi * bandwidth))
        self.register_buffer("phases", uniform(num_channels, scale=2 * math.pi))

    def forward(self, x: Tensor) -> Tensor:
        """`[B]` -> `[B, num_channels]`, computed in float32, returned in x's dtype."""
        angle = torch.outer(x.float(), self.freqs.float()) + self.phases.float()
        return (self.amplitude * angle.cos()).to(x.dtype)


class MPFourier(Fourier):
    """Random Fourier features with unit RMS: `sqrt(2) cos(f x + p)`.

    Ref: EDM2 Eq. 75.
    """

    amplitude = math.sqrt(2)


class NormalizedConv(nn.Module):
    """Convolution or linear map whose weight vectors always act with unit norm.

    The effective weight is `normalize(w) * gain / sqrt(fan_in)`, one norm per output channel, so that unit
    inputs give unit outputs. The normalisation is part of the graph, so gradients are orthogonal to each weight
    vector; the stored weights may still grow (config D). There is no bias; zero padding keeps the size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: `()` for a linear map, two odd sizes such as `(3, 3)` for a convolution.

    Attributes:
        weight: `[out_channels, in_channels, *kernel]`, kept and normalised in the parameter's dtype.

    Raises:
        ValueError: If the kernel has another form.

    Ref: EDM2 Sec. 2.2, Eq. 47, 66.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        if len(kernel) not in (0, 2) or any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(
                f"kernel {tuple(kernel)} must be () for a linear map, or two odd sizes such as (3, 3)"
            )
        self.weight = nn.Parameter(normal(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Apply the layer.

        Args:
            x: `[B, in_channels]` for a linear map, `[B, in_channels, H, W]` for a convolution.
            gain: Scalar that multiplies the output; may be learned.

        Returns:
            `[B, out_channels]` or `[B, out_channels, H, W]`, in x's dtype.
        """
        return apply_weight(x, self.effective_weight(gain).to(x.dtype))

    def effective_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """`normalize(weight) * gain / sqrt(fan_in)`, in the parameter's dtype."""
        w = self.weight
        row_rms = rms(w, tuple(range(1, w.ndim)))
        # One scale per row, so that the large tensor is read and written once.
        scale = gain / (math.sqrt(w[0].numel()) * (EPS + row_rms))
        return w * scale.to(w.dtype)

    def extra_repr(self) -> str:
        """Shape of the weight, for `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, kernel={tuple(self.weight.shape[2:])}"


class MPConv(NormalizedConv):
    """`NormalizedConv` with forced weight normalisation: the stored weights keep unit RMS, too.

    In training mode, the forward pass first overwrites the stored weight by `normalize(w)` outside the autograd
    graph, so that Adam's step size is the relative change of the weight (config E). Arguments as in
    `NormalizedConv`.

    A second forward pass in training mode overwrites what the graph of the first one needs, and a backward pass
    through both fails. Use `ForcedWeightNorm` where a graph has several passes, such as with recomputed activations
    or a network that is fed its own output.

    Attributes:
        forces_norm: Whether a forward pass in training mode overwrites the weight. `ForcedWeightNorm` sets it to
            False.

    Ref: EDM2 Sec. 2.3, Eq. 47, 66, Algorithm 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.forces_norm = True

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """As in `NormalizedConv`."""
        if self.training and self.forces_norm:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, eps=EPS))
        return super().forward(x, gain)


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear map for a weight of two dimensions, else a convolution padded with zeros to keep the size."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=(weight.shape[-2] // 2, weight.shape[-1] // 2))


class ForcedWeightNorm:
    """Forced weight normalisation of a whole model in one pass over its weights, called once a step.

    It does what every `MPConv` does by itself in a training-mode forward pass, but outside of it: forward passes
    then change no weights, which suits torch.compile, gradient accumulation and wrappers. Creating it switches off
    the layers' own normalisation. A model without `MPConv` layers (configs A to D) is left as it is.

    Args:
        module: Any module.

    Example:
        >>> force = ForcedWeightNorm(model)
        >>> for batch in batches:
        ...     force()
        ...     loss(model, batch).backward()

    Ref: EDM2 Sec. 2.3, Algorithm 1.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, MPConv)]
        for layer in self.layers:
            layer.forces_norm = False

    @torch.no_grad()
    def __call__(self) -> None:
        """Overwrite each weight by `normalize(weight)`, without synchronising with the host."""
        if not self.layers:
            return
        # Loading or moving a model may replace parameters, so they are looked up anew; shared ones count once.
        unique: list[Any] = list({id(layer.weight): layer.weight for layer in self.layers}.values())
        # FSDP2 spreads whole rows over processes, and each row has its own norm.
        weights = [w.to_local() if hasattr(w, "to_local") else w for w in unique]
        norms = [
            torch.linalg.vector_norm(
                w,
                dim=tuple(range(1, w.ndim)),
                keepdim=True,
                dtype=torch.promote_types(w.dtype, torch.float32),
            )
            for w in weights
        ]
        torch._foreach_mul_(norms, [1 / math.sqrt(math.prod(w.shape[1:])) for w in weights])
        torch._foreach_add_(norms, EPS)
        torch._foreach_div_(weights, norms)
