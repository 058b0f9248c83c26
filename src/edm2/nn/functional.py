"""Magnitude-preserving functions: unit RMS in, unit RMS out, in expectation.

Ref: EDM2 Sec. 2.3 and App. B; the definitions are in docs/paper_map.md.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SILU_RMS = 0.596  # sqrt(E[silu(n)^2]) for n ~ N(0, 1), rounded as in the paper


def rms(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Root mean square over `dim`, kept as size 1, computed in float32 or better.

    Args:
        x: Any real tensor.
        dim: Dimension or dimensions to reduce.

    Returns:
        float32 (float64 for a float64 `x`), shaped like `x` with `dim` of size 1.
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    # Without the batch, to which torch.export would bind the graph; of a list, because compilers know no generators.
    count = math.prod([x.shape[d] for d in dims])
    return norm * math.sqrt(1 / count) if count else norm


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """Scale `x` to unit RMS: `x / (eps + rms(x))`.

    Over channels this is the pixel norm; over all dimensions but the first, the weight norm.

    Args:
        x: `[B, ...]`.
        dim: Dimensions of the RMS; by default all but the first.
        eps: Added to the RMS, outside the root.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        ValueError: If `x` has one dimension and dim is not given.

    Ref: EDM2 Eq. 30, 47, with eps where the released networks have it.
    """
    if dim is None:
        if x.ndim < 2:
            raise ValueError(
                f"x of shape {tuple(x.shape)} has only one dimension to normalise over: give dim"
            )
        dim = tuple(range(1, x.ndim))
    return x / (eps + rms(x, dim)).to(x.dtype)


def rms_norm(x: Tensor, dim: int | Sequence[int], eps: float = 1e-4) -> Tensor:
    """Scale `x` to unit RMS as the paper writes it: `x / sqrt(mean(x^2) + eps)`.

    `normalize` is the form of the released networks, config G; this one serves configs C to F.

    Args:
        x: Any real tensor.
        dim: Dimensions of the mean, which is taken in float32 or better.
        eps: Added to the mean square, inside the root.

    Returns:
        Same shape and dtype as `x`.

    Ref: EDM2 Eq. 29-30.
    """
    return x / (rms(x, dim).square() + eps).sqrt().to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by its RMS under a unit normal input.

    Ref: EDM2 Eq. 81.
    """
    return F.silu(x) / SILU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Mix from `a` (t = 0) to `b` (t = 1) and rescale, so that independent unit inputs give unit RMS.

    Ref: EDM2 Eq. 88.
    """
    norm = math.sqrt((1 - t) ** 2 + t**2)
    if torch.compiler.is_compiling():
        # Inductor (torch 2.13) loses alpha where b is a matrix product: it fuses the two without it.
        return a * ((1 - t) / norm) + b * (t / norm)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_add(a: Tensor, b: Tensor, rms_b: Tensor) -> Tensor:
    """`(a + b) / sqrt(1 + rms_b^2)`: unit RMS for independent `a` of unit RMS and `b` of a known one.

    Unlike in `mp_sum`, a `b` of zero leaves `a` exactly as it is.

    Args:
        a: `[B, C]`.
        b: `[B, C]`.
        rms_b: `[B, 1]`, the expected RMS of `b`.

    Returns:
        `[B, C]` in a's dtype.

    Ref: EDM2 Sec. 2.4, Eq. 88 with fixed shares instead.
    """
    return (a + b) * (1 + rms_b.float().square()).rsqrt().to(a.dtype)


def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    """Concatenate along `dim`, weighting the inputs' contributions by `1 - t` and `t` whatever their widths.

    Ref: EDM2 Eq. 103.
    """
    width_a, width_b = a.shape[dim], b.shape[dim]
    scale = math.sqrt((width_a + width_b) / ((1 - t) ** 2 + t**2))
    return torch.cat(
        [a * ((1 - t) * scale / math.sqrt(width_a)), b * (t * scale / math.sqrt(width_b))], dim=dim
    )


def resample(x: Tensor, mode: Literal["keep", "down", "up"] = "keep") -> Tensor:
    """Halve or double the resolution with the separable filter [1, 1].

    Args:
        x: `[B, C, H, W]`, with even H and W for `down`.
        mode: `keep` returns `x`; `down` averages each 2x2 cell; `up` repeats each pixel 2x2.

    Raises:
        ValueError: If the mode is none of these.

    Ref: EDM2 App. B.1.
    """
    if mode == "keep":
        return x
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode != "up":
        raise ValueError(f"resample mode {mode!r} is not one of 'keep', 'down', 'up'")
    if torch.compiler.is_compiling():
        # Inductor (torch 2.13, CPU) can make gradients of what comes before `interpolate` zero.
        batch, channels, height, width = x.shape
        cells = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return cells.reshape(batch, channels, 2 * height, 2 * width)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
