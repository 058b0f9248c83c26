"""The training step of config G in fewer passes over memory, equal to the plain form up to rounding.

`Block.forward` is the form to read. While gradients are recorded in training mode, it calls `block_forward` instead:

- The constants of `mp_silu` and `mp_sum` act on the weights of the next or previous convolution.
- Normalisation of activations and weights is one function with its derivative in closed form.
- The weights of attention are ordered so that a head's queries, keys and values lie side by side in memory.

Inference, compilers, forward-mode derivatives and layers that were replaced or hooked use the plain form.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
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


def applies(block: "Block") -> bool:
    """Whether a block's forward pass can take the fast form now."""
    return (
        not torch.compiler.is_compiling()
        and block.training
        and block.features.name == "G"
        and torch.is_grad_enabled()
        and _wanted.get()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and all(
            type(layer) is MPConv and not layer.forces_norm and not _hooked(layer)
            for layer in block.children()
        )
    )


def _hooked(layer: Any) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def block_forward(
    block: "Block", x: Tensor, emb: Tensor, dropout_index: Tensor | None, dropout_seed: int
) -> Tensor:
    """`Block.forward` of config G; arguments and result as there."""
    f = block.features
    is_decoder = block.flavor == "dec"
    main, branch = _shares(f.res_balance)
    x = resample(x, block.resample_mode)
    if not is_decoder:
        if block.conv_skip is not None:
            x = _convolve(x, block.conv_skip)
        x = unit(x, (1,))
    y = _convolve(F.silu(x), block.conv_res0, 1 / SILU_RMS)
    assert block.emb_gain is not None
    scale = _convolve(emb, block.emb_linear) * block.emb_gain
    y = F.silu(y * (1 + scale)[:, :, None, None])
    y = drop(y, f.dropout, dropout_index, seed=dropout_seed, stream=block.dropout_stream)
    y = _convolve(y, block.conv_res1, branch / SILU_RMS)
    skip = block.conv_skip if is_decoder else None
    x = _add(x, main, y) if skip is None else _convolve(x, skip, main) + y
    if block.attn_qkv is not None:
        main, branch = _shares(f.attn_balance)
        x = _add(x, main, _attend(block, x, branch))
    return x if f.clip_act == math.inf else F.hardtanh_(x, -f.clip_act, f.clip_act)


def _shares(t: float) -> tuple[float, float]:
    """Factors of `mp_sum`."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def _add(x: Tensor, factor: float, y: Tensor) -> Tensor:
    """`factor x + y`."""
    # In 16 bits, alpha would be rounded, and the error would be the same in every block.
    return torch.add(y, x, alpha=factor) if x.dtype == torch.float32 else x * factor + y


def _attend(block: "Block", x: Tensor, gain: float) -> Tensor:
    """`attend` with the layers of a block, times a gain."""
    assert block.attn_qkv is not None
    assert block.attn_proj is not None
    batch, channels, height, width = x.shape
    heads = block.num_heads
    # From (head, channel, q/k/v) to (q/k/v, head, channel).
    weight = effective_weight(block.attn_qkv).to(x.dtype).reshape(heads, channels // heads, 3, channels)
    weight = weight.permute(2, 0, 1, 3).reshape(3 * channels, channels, 1, 1)
    y = apply_weight(x, weight).permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, -1)
    # On the CPU, the gradient of attention in 16 bits is several times slower.
    y = unit(y.float() if y.device.type == "cpu" and y.element_size() == 2 else y, (4,))
    q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, pixels, channels per head] each
    y = F.scaled_dot_product_attention(q, k, v).to(x.dtype).transpose(1, 2)
    y = y.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return _convolve(y, block.attn_proj, gain)


def _convolve(x: Tensor, layer: Any, gain: float = 1.0) -> Tensor:
    return apply_weight(x, effective_weight(layer, gain).to(x.dtype))


def effective_weight(layer: Any, gain: float = 1.0) -> Tensor:
    """`layer.effective_weight(gain)`."""
    weight: Tensor = layer.weight
    root = math.sqrt(weight[0].numel())
    scaled: Tensor = _scaled(weight, tuple(range(1, weight.ndim)), gain, root * EPS)
    return scaled


def unit(x: Tensor, dim: tuple[int, ...], eps: float = EPS) -> Tensor:
    """`normalize(x, dim, eps)`."""
    root = math.sqrt(math.prod([x.shape[d] for d in dim]))
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
