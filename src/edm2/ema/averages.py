"""The running averages themselves: one pass over a module's tensors for all tracks, in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCRATCH_ELEMENTS = 1 << 24
_CACHED_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Tensors updated by one call a track, with room to convert them where the types differ."""

    indices: list[int]
    targets: list[list[Tensor]]
    scratch: list[Tensor]


class Averages:
    """Several running averages of the same tensors.

    Args:
        tensors: Local tensors at the start; every average starts as a copy.
        num_tracks: Number of averages.
        dtype: Element type of the averages.

    Attributes:
        tracks: The averages, one list a track.
    """

    def __init__(self, tensors: Sequence[Tensor], num_tracks: int, *, dtype: torch.dtype) -> None:
        self.tracks = [[x.detach().to(dtype, copy=True) for x in tensors] for _ in range(num_tracks)]
        self._buckets = list(self._make_buckets(tensors, dtype))

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
            for target, weight in zip(bucket.targets, weights, strict=True):
                if weight == 1.0:
                    torch._foreach_copy_(target, source)
                else:
                    torch._foreach_lerp_(target, source, weight)

    def _make_buckets(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[_Bucket]:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
        buckets = []
        for (device, source_dtype), indices in groups.items():
            convert = source_dtype != dtype
            # On a CPU a few tensors at a time stay in the cache while every track reads them; elsewhere
            # fewer calls are better, and only the room for converted tensors is bounded.
            limit = _CACHED_ELEMENTS if device.type == "cpu" else _SCRATCH_ELEMENTS if convert else None
            parts = _split(indices, [tensors[i].numel() for i in indices], limit)
            room = max(sum(tensors[i].numel() for i in part) for part in parts) if convert else 0
            flat = torch.empty(room, dtype=dtype, device=device)
            for part in parts:
                targets = [[track[i] for i in part] for track in self.tracks]
                scratch = _views(flat, [tensors[i] for i in part]) if convert else []
                buckets.append(_Bucket(indices=part, targets=targets, scratch=scratch))
        return buckets


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [x.numel() for x in like]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(x.shape) for piece, x in zip(pieces, like, strict=True)]


def _split(indices: list[int], sizes: list[int], limit: int | None) -> list[list[int]]:
    """Cut a list into runs of at most `limit` elements together, or single larger ones."""
    if limit is None:
        return [indices]
    parts: list[list[int]] = []
    room = 0
    for index, size in zip(indices, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(index)
        room -= size
    return parts
