"""The blocks of config G in fewer passes over memory, equal to the plain form up to rounding.

`Block.forward` is the form to read. It calls `block_forward` instead in training mode, and in copies for sampling,
whose layers are `FoldedConv`:

- The constants of `mp_silu` and `mp_sum` act on the weights of the next or previous convolution.
- Normalisation of activations and weights is one function with its derivative in closed form.
- The weights of attention are ordered so that a head's queries, keys and values lie side by side in memory.

Other inference, compilers, forward-mode derivatives and layers that were replaced or hooked use the plain form.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from edm2.nn.functional import SILU_RMS, resample
from edm2.nn.keyed_random import drop
from edm2.nn.layers import EPS, MPConv, apply_weight

if TYPE_CHECKING:
    from edm2.nn.blocks import Block

_wanted = ContextVar("edm2_fast", default=True)
_TINY = 1e-30  # a float32 above 0: vectors of zeros have gradients of zeros


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Use the plain forms only, for comparison."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


class FixedConv(nn.Module):
    """A `NormalizedConv` for inference, with a given effective weight, which includes the gain."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """As in `NormalizedConv`, bit for bit; the weight already includes the gain."""
        return apply_weight(x, self.weight.to(x.dtype))


class FoldedConv(FixedConv):
    """A layer of a block that takes the fast form for inference; its weight is that of `weight_of`."""


def applies(block: "Block") -> bool:
    """Whether a block's forward pass takes the fast form now."""
    return type(block.conv_res0) is FoldedConv or (
        not torch.compiler.is_compiling()
        and block.training
        and _wanted.get()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and can_fold(block)
        and not any(layer.forces_norm for layer in block.children())
    )


def can_fold(block: "Block") -> bool:
    """Whether a block has a fast form: it is one of config G, and no layer was replaced or hooked."""
    return block.features.name == "G" and all(
        type(layer) is MPConv and not _hooked(layer) for layer in block.children()
    )


def _hooked(layer: Any) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def block_forward(
    block: "Block", x: Tensor, emb: Tensor, dropout_index: Tensor | None, dropout_seed: int
) -> Tensor:
    """`Block.forward` of config G; arguments and result as there."""
    f = block.features
    free = not torch.is_grad_enabled()  # what only the gradient needs may be overwritten
    x = resample(x, block.resample_mode)
    if block.flavor == "enc":
        if block.conv_skip is not None:
            x = _convolve(x, block, "conv_skip")
        x = unit(x, (1,))
    y = _convolve(F.silu(x), block, "conv_res0")
    assert block.emb_gain is not None
    scale = (1 + _convolve(emb, block, "emb_linear") * block.emb_gain)[:, :, None, None]
    y = F.silu(y.mul_(scale), inplace=True) if free else F.silu(y * scale)
    if block.training:
        y = drop(y, f.dropout, dropout_index, seed=dropout_seed, stream=block.dropout_stream)
    y = _convolve(y, block, "conv_res1")
    if block.flavor == "dec" and block.conv_skip is not None:
        x = _convolve(x, block, "conv_skip")
        x = x.add_(y) if free else x + y
    else:
        x = _add(x, _shares(f.res_balance)[0], y)
    if block.attn_qkv is not None:
        x = _add(x, _shares(f.attn_balance)[0], _attend(block, x))
    return x if f.clip_act == math.inf else F.hardtanh_(x, -f.clip_act, f.clip_act)


def _shares(t: float) -> tuple[float, float]:
    """Factors of `mp_sum`."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def _add(x: Tensor, factor: float, y: Tensor) -> Tensor:
    """`factor x + y`."""
    if x.dtype != torch.float32:  # alpha would be rounded, and the error would be the same in every block
        return x * factor + y
    return torch.add(y, x, alpha=factor) if torch.is_grad_enabled() else y.add_(x, alpha=factor)


def _attend(block: "Block", x: Tensor) -> Tensor:
    """`attend` with the layers of a block, times the branch's share."""
    batch, channels, height, width = x.shape
    y = _convolve(x, block, "attn_qkv").permute(0, 2, 3, 1)
    y = y.reshape(batch, height * width, 3, block.num_heads, -1)
    # On the CPU, attention in 16 bits is up to 1.6 times slower, and its gradient several times.
    slow = y.device.type == "cpu" and y.element_size() == 2
    y = unit(y.float() if slow else y, (4,))
    q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, pixels, channels per head] each
    y = F.scaled_dot_product_attention(q, k, v).to(x.dtype).transpose(1, 2)
    return _convolve(y.reshape(batch, height, width, channels).permute(0, 3, 1, 2), block, "attn_proj")


def _convolve(x: Tensor, block: "Block", name: str) -> Tensor:
    return apply_weight(x, weight_of(block, name).to(x.dtype))


def weight_of(block: "Block", name: str) -> Tensor:
    """Weight of a block's layer in the fast form, which includes the constants before and after the layer."""
    layer: Any = getattr(block, name)
    if type(layer) is FoldedConv:
        return layer.weight
    gain = 1.0
    if name == "conv_res0":
        gain = 1 / SILU_RMS
    elif name == "conv_res1":
        gain = _shares(block.features.res_balance)[1] / SILU_RMS
    elif name == "conv_skip" and block.flavor == "dec":
        gain = _shares(block.features.res_balance)[0]
    elif name == "attn_proj":
        gain = _shares(block.features.attn_balance)[1]
    weight = effective_weight(layer, gain)
    if name == "attn_qkv":  # from (head, channel, q/k/v) to (q/k/v, head, channel)
        channels = weight.shape[1]
        weight = weight.reshape(block.num_heads, channels // block.num_heads, 3, channels)
        weight = weight.permute(2, 0, 1, 3).reshape(3 * channels, channels, 1, 1)
    return weight


def effective_weight(layer: Any, gain: float = 1.0) -> Tensor:
    """`layer.effective_weight(gain)`."""
    weight: Tensor = layer.weight
    root = math.sqrt(weight[0].numel())
    scaled: Tensor = _scaled(weight, tuple(range(1, weight.ndim)), gain, root * EPS)
    return scaled


def unit(x: Tensor, dim: tuple[int, ...], eps: float = EPS) -> Tensor:
    """`normalize(x, dim, eps)`."""
    root = math.sqrt(math.prod([x.shape[d] for d in dim]))
    if not torch.is_grad_enabled():
        return x * ((_norm(x, dim) + root * eps).reciprocal_() * root).to(x.dtype)
    scaled: Tensor = _scaled(x, dim, root, root * eps)
    return scaled


class _Scaled(Function):
    """`gain x / (floor + |x|)`, with the norm over `dim`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: tuple[int, ...], gain: float, floor: float) -> Tensor:
        norm = _norm(x, dim)
        inverse = (norm + floor).reciprocal_()
        scale = (inverse * gain).to(x.dtype)
        ctx.save_for_backward(x, scale, inverse.square_().div_(norm.clamp_(min=_TINY)).mul_(-gain))
        ctx.options = (dim, gain, floor)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, factor = ctx.saved_tensors
        dim, gain, floor = ctx.options
        if torch.is_grad_enabled():  # a second derivative is wanted
            plain = x * (gain / (floor + _norm(x, dim))).to(x.dtype)
            return torch.autograd.grad(plain, x, grad, create_graph=True)[0], None, None, None
        along = (grad * x).sum(dim, keepdim=True, dtype=factor.dtype).mul_(factor)
        return torch.addcmul(grad * scale, x, along.to(x.dtype)), None, None, None


_scaled: Any = _Scaled.apply


def _norm(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    return norm
