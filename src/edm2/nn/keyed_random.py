"""Random numbers that are a function of (seed, index, stream), without a state to store.

Training noise depends on an image's position in the run, sampling noise on the image's own seed; neither changes with
the batch size, the number of processes or a restart. The generator is Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), written with int64 tensor operations so that every device gives the same bits.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on broadcastable int64 tensors that hold 32-bit words.

    Args:
        counter: Four words.
        key: Two words.

    Returns:
        Four words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps around in int64, but its low 64 bits are right, and the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def keyed_bits(index: Tensor, count: int, *, seed: int = 0, stream: int = 0) -> Tensor:
    """Independent uniform 32-bit words for each index.

    Args:
        index: `[B]` int64, such as image positions in a run, or one seed per image.
        count: Number of words per index.
        seed: 64-bit seed shared by all.
        stream: Number in [0, 2^32) that separates uses of the same index.

    Returns:
        `[B, count]` int64 in [0, 2^32).
    """
    assert 0 <= stream <= _MASK, stream
    index = index.long()[:, None]
    block = torch.arange(-(-count // 4), device=index.device)[None, :]
    zero = torch.zeros_like(block)
    counter = (block, zero + stream, zero + (index & _MASK), zero + ((index >> 32) & _MASK))
    words = philox(counter, (zero + (seed & _MASK), zero + ((seed >> 32) & _MASK)))
    return torch.stack(words, dim=2).flatten(1)[:, :count]


def keyed_uniform(index: Tensor, shape: Sequence[int] = (), *, seed: int = 0, stream: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), `[B, *shape]` float32; arguments as in `keyed_bits`."""
    bits = keyed_bits(index, math.prod(shape), seed=seed, stream=stream)
    # 23 bits and half a step: exact in float32, never 0 and never 1.
    return (((bits >> 9).float() + 0.5) * 2**-23).reshape(len(index), *shape)


def keyed_normal(index: Tensor, shape: Sequence[int] = (), *, seed: int = 0, stream: int = 0) -> Tensor:
    """Standard normal numbers by Box and Muller, `[B, *shape]` float32; arguments as in `keyed_bits`.

    Values stay within 5.77 standard deviations, beyond which a normal has 8e-9 of its mass.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    radius, angle = keyed_uniform(index, (2, half), seed=seed, stream=stream).unbind(1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normal[:, :count].reshape(len(index), *shape)


def keyed_dropout(x: Tensor, p: float, index: Tensor, *, seed: int = 0, stream: int = 0) -> Tensor:
    """Dropout whose mask is a function of (seed, index, stream, element) alone.

    Args:
        x: `[B, ...]`.
        p: Probability that an element becomes 0; the others are divided by 1 - p.
        index: `[B]` int64, one for each image of the batch.
        seed: 64-bit seed shared by all.
        stream: Number in [0, 2^32), one for each dropout layer.
    """
    # Philox for every activation would cost as much as the convolution; a multiplicative hash of the element's
    # number, started from one Philox word per image, is good enough for a mask.
    start = keyed_bits(index, 1, seed=seed, stream=stream)
    h = (torch.arange(x[0].numel(), device=x.device)[None, :] * 0x9E3779B1 + start) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    keep = (h ^ (h >> 16)) >= int(p * 2**32)
    return x * keep.reshape(x.shape).to(x.dtype) / (1 - p)


def drop(x: Tensor, p: float, index: Tensor | None, *, seed: int, stream: int) -> Tensor:
    """Dropout with masks from (seed, index, stream); without an index, from torch's generator."""
    if p == 0:
        return x
    if index is None:
        return F.dropout(x, p)
    return keyed_dropout(x, p, index, seed=seed, stream=stream)
