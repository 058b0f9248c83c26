"""The running averages themselves: one pass over a module's tensors for all tracks, in place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edm2.ema.tracking.window import Step, Window

_SCRATCH_ELEMENTS = 1 << 24
_CACHED_ELEMENTS = 1 << 19
_FOLDED_ELEMENTS = 1 << 22


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
        tracks: The averages, one list a track, without what is still in the window.
        window: The mean of the weights that are not in them yet; None until the first one is needed.
    """

    def __init__(self, tensors: Sequence[Tensor], num_tracks: int, *, dtype: torch.dtype) -> None:
        self.tracks = [[x.detach().to(dtype, copy=True) for x in tensors] for _ in range(num_tracks)]
        self.window: Window | None = None
        self._kinds = [x.dtype for x in tensors]
        self._buckets = list(self._make_buckets(tensors, dtype))

    def update(self, tensors: Sequence[Tensor], step: Step) -> None:
        """Move every average towards the tensors, at once or by way of the window.

        Args:
            tensors: The tensors now, in the order given at the start.
            step: Shares of the new tensors.
        """
        if step.share < 1.0 or step.weights is None:
            window = self.make_window()
            window.gather(tensors, step.share)
            if step.weights is not None:
                window.fold(step.weights, step.dither)
            return
        for bucket in self._buckets:
            source = [tensors[i] for i in bucket.indices]
            if bucket.scratch:
                torch._foreach_copy_(bucket.scratch, source)
                source = bucket.scratch
            for target, weight in zip(bucket.targets, step.weights, strict=True):
                if weight == 1.0:
                    torch._foreach_copy_(target, source)
                else:
                    torch._foreach_lerp_(target, source, weight)

    def make_window(self) -> Window:
        """The window, made where there is none yet."""
        if self.window is None:
            on_cpu = all(x.device.type == "cpu" for x in self.tracks[0])
            self.window = Window(self.tracks, self._kinds, _CACHED_ELEMENTS if on_cpu else _FOLDED_ELEMENTS)
        return self.window

    def read(self, track: int, share: float) -> Iterator[Tensor]:
        """An average with what is in the window, tensor by tensor; changes nothing.

        Args:
            track: Which average.
            share: Share of the window in it; 0 gives the running average itself.
        """
        if not share:
            yield from self.tracks[track]
            return
        for first, difference, average in zip(
            self.tracks[0], self.make_window().difference, self.tracks[track], strict=True
        ):
            yield (first - average).add_(difference).mul_(share).add_(average)

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
