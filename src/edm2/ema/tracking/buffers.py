"""Flat buffers that hold averages of many tensors and are worked on piece by piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CACHED_ELEMENTS = (
    1 << 20
)  # worked on at a time on a CPU: fewer calls, and still in the cache of its last level
_SCRATCH_ELEMENTS = 1 << 24  # worked on at a time elsewhere


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in the flat buffers: its dimensions in the order of its memory."""

    begin: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The tensor's part of a flat buffer, in its own shape and memory format."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        size = torch.Size(self.shape).numel()
        return flat[self.begin : self.begin + size].view(self.shape).permute(back)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Tensors, or rows of a large one, that are worked on together, and scratch space for them."""

    sources: list[tuple[int, tuple[int, ...] | None, slice | None]]
    span: slice
    new: Tensor
    other: Tensor
    new_views: list[Tensor]
    other_views: list[Tensor]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sources of the piece, as they are now."""
        found = []
        for index, order, rows in self.sources:
            x = tensors[index] if order is None else tensors[index].permute(order)
            found.append(x if rows is None else x[rows])
        return found


class Block:
    """Averages of tensors of one device and type, each in one flat buffer that is worked on piece by piece."""

    def __init__(
        self, indices: Sequence[int], tensors: Sequence[Tensor], num_tracks: int, dtype: torch.dtype
    ) -> None:
        device, self._converts = tensors[indices[0]].device, tensors[indices[0]].dtype != dtype
        self.places: dict[int, Place] = {}
        size = 0
        for i in indices:
            order = _memory_order(tensors[i])
            shape = tuple(tensors[i].shape[d] for d in order)
            self.places[i] = Place(begin=size, shape=shape, order=order)
            size += tensors[i].numel()
        self.base = torch.empty(size, dtype=torch.bfloat16, device=device)
        self.offsets = [torch.zeros(size, dtype=dtype, device=device) for _ in range(num_tracks)]
        self.windows: list[Tensor] = []
        limit = _CACHED_ELEMENTS if device.type == "cpu" else _SCRATCH_ELEMENTS
        self._pieces = self._cut(limit)
        self._runs = _runs([tensors[i].numel() for i in indices], limit)
        for i, place in self.places.items():
            x = tensors[i].detach()
            base = place.of(self.base).copy_(x)
            for offsets in self.offsets:
                place.of(offsets).copy_(base).sub_(x)

    def make_windows(self, count: int) -> list[Tensor]:
        """One window for all averages or one for each: made where they are missing, dropped where there are more."""
        if len(self.windows) != count:
            made = [torch.zeros_like(self.offsets[0]) for _ in range(count - len(self.windows))]
            self.windows = [*self.windows[:count], *made]
            self._window_views = [[p.of(window) for p in self.places.values()] for window in self.windows]
        return self.windows

    def update(
        self,
        tensors: Sequence[Tensor],
        shares: Sequence[float],
        weights: Sequence[float] | None,
        *,
        plain: bool,
    ) -> None:
        """Take tensors into the averages or the windows.

        Args:
            tensors: All tensors now.
            shares: Share of them in each window; 1 where they begin it.
            weights: Share of the full window in each average; None where it stays open.
            plain: Whether windows are means of the weights, not of their offsets from the base.
        """
        windows = [] if weights is not None and shares[0] == 1.0 else self.make_windows(len(shares))
        plain = plain and bool(windows)
        if plain:
            self._add_plainly(tensors, shares)
            if weights is None:
                return
        for piece in self._pieces:
            if not plain:
                new = self._subtract(piece, tensors)
                if windows:
                    new = _move(windows[0][piece.span], new, shares[0])
            for track, (offsets, weight) in enumerate(
                zip(self.offsets, weights or (), strict=weights is not None)
            ):
                if plain and track < len(windows):
                    new = piece.new.copy_(self.base[piece.span]).sub_(windows[track][piece.span])
                _move(offsets[piece.span], new, weight)

    def _subtract(self, piece: _Piece, tensors: Sequence[Tensor]) -> Tensor:
        """The base minus the tensors, in a piece's scratch space."""
        new = piece.new.copy_(self.base[piece.span])
        if self._converts:
            torch._foreach_copy_(piece.other_views, piece.gather(tensors))
            return new.sub_(piece.other)
        torch._foreach_sub_(piece.new_views, piece.gather(tensors))
        return new

    def _add_plainly(self, tensors: Sequence[Tensor], shares: Sequence[float]) -> None:
        sources = [tensors[i] for i in self.places]
        if shares[0] == 1.0:
            for views in self._window_views:
                torch._foreach_copy_(views, sources)
        elif not self._converts:
            # Several windows take turns, so that tensors are still in the cache.
            for run in self._runs if len(shares) > 1 else [slice(None)]:
                for views, share in zip(self._window_views, shares, strict=True):
                    torch._foreach_lerp_(views[run], sources[run], share)
        else:
            for piece in self._pieces:
                torch._foreach_copy_(piece.other_views, piece.gather(tensors))
                for window, share in zip(self.windows, shares, strict=True):
                    window[piece.span].lerp_(piece.other, share)

    def rebase(self, tensors: Sequence[Tensor]) -> None:
        """Take the tensors as the base; the averages stay what they are."""
        for piece in self._pieces:
            base = self.base[piece.span]
            old = piece.other.copy_(base)
            torch._foreach_copy_(piece.new_views, piece.gather(tensors))
            base.copy_(piece.new)
            shift = piece.new.copy_(base).sub_(old)
            for offsets in self.offsets:
                offsets[piece.span].add_(shift)

    def _cut(self, limit: int) -> list[_Piece]:
        groups: list[list[tuple[int, slice | None, int, tuple[int, ...]]]] = []
        room = 0
        for i, place in self.places.items():
            for rows, shape in _rows(place.shape, limit):
                size = torch.Size(shape).numel()
                if not groups or size > room:
                    groups.append([])
                    room = limit
                groups[-1].append((i, rows, size, shape))
                room -= size
        sizes = [sum(size for _, _, size, _ in group) for group in groups]
        scratch = [self.offsets[0].new_empty(max(sizes)) for _ in range(2)]
        pieces, begin = [], 0
        for group, size in zip(groups, sizes, strict=True):
            sources = []
            for i, rows, _, _ in group:
                order = self.places[i].order
                sources.append((i, None if order == tuple(range(len(order))) else order, rows))
            new, other = (x[:size] for x in scratch)
            parts = [n for _, _, n, _ in group]
            views = [
                [x.view(shape) for x, (*_, shape) in zip(torch.split(flat, parts), group, strict=True)]
                for flat in (new, other)
            ]
            pieces.append(
                _Piece(
                    sources=sources, span=slice(begin, begin + size), new=new, other=other,
                    new_views=views[0], other_views=views[1],
                )
            )  # fmt: skip
            begin += size
        return pieces


def _runs(sizes: Sequence[int], limit: int) -> list[slice]:
    """Neighbours that together have no more elements than the limit, or one by itself."""
    begins, room = [0], limit
    for i, size in enumerate(sizes):
        if size > room and i:
            begins.append(i)
            room = limit
        room -= size
    return [slice(a, b) for a, b in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def _move(to: Tensor, towards: Tensor, share: float) -> Tensor:
    return to.copy_(towards) if share == 1.0 else to.lerp_(towards, share)


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest, where they fill the memory without gaps."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    return order if tensor.permute(order).is_contiguous() else tuple(range(tensor.dim()))


def _rows(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice | None, tuple[int, ...]]]:
    """Cut a tensor of more elements than the limit into runs of rows."""
    size = torch.Size(shape).numel()
    if size <= limit or not shape:
        yield None, shape
        return
    step = max(1, limit * shape[0] // size)
    for begin in range(0, shape[0], step):
        rows = slice(begin, min(begin + step, shape[0]))
        yield rows, (rows.stop - begin, *shape[1:])
