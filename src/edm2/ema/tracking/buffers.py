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
        self.window: Tensor | None = None
        self._pieces = self._cut(_CACHED_ELEMENTS if device.type == "cpu" else _SCRATCH_ELEMENTS)
        for i, place in self.places.items():
            x = tensors[i].detach()
            base = place.of(self.base).copy_(x)
            for offsets in self.offsets:
                place.of(offsets).copy_(base).sub_(x)

    def make_window(self) -> Tensor:
        """The mean of the weights over the open window, plain or as an offset; made where there is none yet."""
        if self.window is None:
            self.window = torch.zeros_like(self.offsets[0])
            self._window_views = [place.of(self.window) for place in self.places.values()]
        return self.window

    def update(
        self, tensors: Sequence[Tensor], share: float, weights: Sequence[float] | None, *, plain: bool
    ) -> None:
        """Take tensors into the averages or the window.

        Args:
            tensors: All tensors now.
            share: Share of them in the window; 1 where they begin it.
            weights: Share of the full window in each average; None where it stays open.
            plain: Whether the window is a mean of weights, not of their offsets from the base.
        """
        window = None if share == 1.0 and weights is not None else self.make_window()
        if window is not None and plain:
            self._add_plainly(tensors, share)
            if weights is None:
                return
        for piece in self._pieces:
            new = piece.new.copy_(self.base[piece.span])
            if window is not None and plain:
                new.sub_(window[piece.span])
            elif self._converts:
                torch._foreach_copy_(piece.other_views, piece.gather(tensors))
                new.sub_(piece.other)
            else:
                torch._foreach_sub_(piece.new_views, piece.gather(tensors))
            if window is not None and not plain:
                new = _move(window[piece.span], new, share)
            for offsets, weight in zip(self.offsets, weights or (), strict=weights is not None):
                _move(offsets[piece.span], new, weight)

    def _add_plainly(self, tensors: Sequence[Tensor], share: float) -> None:
        window = self.make_window()
        if share == 1.0:
            torch._foreach_copy_(self._window_views, [tensors[i] for i in self.places])
        elif not self._converts:
            torch._foreach_lerp_(self._window_views, [tensors[i] for i in self.places], share)
        else:
            for piece in self._pieces:
                torch._foreach_copy_(piece.other_views, piece.gather(tensors))
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
