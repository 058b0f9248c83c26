"""The running averages themselves: one pass over a module's tensors for all tracks, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SCRATCH_ELEMENTS = 1 << 24


class Averages:
    """Several running averages of the same tensors.

    Args:
        tensors: Local tensors at the start; every average starts as a copy.
        num_tracks: Number of averages.
        dtype: Element type of the averages.
    """

    def __init__(self, tensors: Sequence[Tensor], num_tracks: int, *, dtype: torch.dtype) -> None:
        self.tracks = [[x.detach().to(dtype, copy=True) for x in tensors] for _ in range(num_tracks)]
        self._buckets = _buckets(tensors, dtype)

    def update(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Move every average towards the tensors.

        Args:
            tensors: The tensors now, in the order given at the start.
            weights: Share of the new tensors, one a track, in (0, 1].
        """
        for bucket in self._buckets:
            source = [tensors[i] for i in bucket.indices]
            if bucket.scratch:
                torch._foreach_copy_(bucket.scratch, source)
                source = bucket.scratch
            for track, weight in zip(self.tracks, weights, strict=True):
                target = [track[i] for i in bucket.indices]
                if weight == 1.0:
                    torch._foreach_copy_(target, source)
                else:
                    torch._foreach_lerp_(target, source, weight)


class _Bucket:
    """Tensors that are updated by one call, with room to convert them where the types differ."""

    def __init__(self, indices: list[int], scratch: list[Tensor]) -> None:
        self.indices = indices
        self.scratch = scratch


def _buckets(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[_Bucket]:
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    buckets = []
    for (device, source_dtype), indices in groups.items():
        if source_dtype == dtype:
            buckets.append(_Bucket(indices, []))
            continue
        parts = _split(indices, [tensors[i].numel() for i in indices])
        room = max(sum(tensors[i].numel() for i in part) for part in parts)
        flat = torch.empty(room, dtype=dtype, device=device)
        for part in parts:
            sizes = [tensors[i].numel() for i in part]
            views = [
                piece.view(tensors[i].shape)
                for piece, i in zip(flat[: sum(sizes)].split(sizes), part, strict=True)
            ]
            buckets.append(_Bucket(part, views))
    return buckets


def _split(indices: list[int], sizes: list[int]) -> list[list[int]]:
    parts: list[list[int]] = []
    room = 0
    for index, size in zip(indices, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = _SCRATCH_ELEMENTS
        parts[-1].append(index)
        room -= size
    return parts
