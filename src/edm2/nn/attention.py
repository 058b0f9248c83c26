"""Self-attention over pixels, shared by the blocks of all configurations."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """`[B, 3C, H, W]` -> `[B, heads, C / heads, 3, H W]`.

    The q/k/v index is the fastest part of the channel axis, as in the released weights.
    """
    batch, channels, height, width = qkv.shape
    return qkv.reshape(batch, num_heads, channels // (3 * num_heads), 3, height * width)


def attend(
    x: Tensor,
    qkv: Callable[[Tensor], Tensor],
    proj: Callable[[Tensor], Tensor],
    *,
    num_heads: int,
    normalize: Callable[[Tensor, int], Tensor] | None,
    fp32_logits: bool = False,
) -> Tensor:
    """Self-attention over the pixels, `[B, C, H, W]` -> same.

    Args:
        x: Input.
        qkv: Layer from C to 3C channels.
        proj: Layer from C to C channels.
        num_heads: Number of heads, a divisor of C.
        normalize: Norm of queries, keys and values over a head's channels, which makes the logits cosines
            (config C and later). None: plain dot products.
        fp32_logits: Whether logits and softmax are float32 whatever the precision of x.

    Ref: EDM2 Sec. 2.1, App. B.1, B.3.
    """
    y = split_heads(qkv(x), num_heads)
    if normalize is not None:
        y = normalize(y, 2)
    # [B, heads, pixels, channels per head] each
    q, k, v = y.permute(3, 0, 1, 4, 2).unbind(0)
    scale = 1 / math.sqrt(q.shape[-1])
    if fp32_logits and x.dtype != torch.float32:
        logits = q.float() @ k.float().transpose(-1, -2) * scale
        y = logits.softmax(dim=-1).to(v.dtype) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return proj(y.transpose(2, 3).reshape(x.shape))
