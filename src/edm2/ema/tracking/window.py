"""Windows: how averages go on moving in long runs, where one update is less than float32's rounding.

An update at time t moves an average by (gamma + 1) dt / t of its distance to the weights. When t is thousands
of dt, this is no more than a few roundings of float32: the average freezes. So in long runs an update goes into
the mean of the weights over a short window of time, one for all averages, and a full window goes into each
average with its whole share. That is a bounded number of roundings within the length of any average, and they
are dithered, so that a motion far below one rounding a window still adds up to the right sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from edm2.ema.maths.profiles import step_weight

LONG_RUN = 8192
"""Equal updates after which windows begin; up to there every update goes into the averages at once."""

# A window is a part of the training so far, mostly of eight updates or more. Within it all weights count alike; the
# exact shares differ from that by less than 1 / _EVENNESS to either side, also in narrow averages.
_WINDOWS_A_RUN = LONG_RUN / 8
_EVENNESS = 64
# In steps of float32 at 1: wide enough that the mean rounding error does not depend on what is rounded.
_DITHER = 0.6 * 2.0**-23
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one update does.

    Attributes:
        share: Share of the new weights in the mean of the window; 1 where they are all of it.
        weights: Share of the window in each average when this update fills it; None where it stays open.
        dither: Part of an average's size that is added to its next change.
    """

    share: float
    weights: Sequence[float] | None
    dither: float = 0.0


def next_step(
    gammas: Sequence[float], *, elapsed: float, dt: float, span: float, folds: int, exact: bool
) -> Step:
    """Decide where new weights go.

    Args:
        gammas: Exponents of the averages.
        elapsed: Time since training started, this update included.
        dt: Time since the last update.
        span: Time since the averages last took weights in; that of the window with this update.
        folds: Number of windows so far.
        exact: The averages need no windows (float64).
    """
    full = exact or span * max(_WINDOWS_A_RUN, _EVENNESS * (max(gammas) + 1)) >= elapsed
    if span == dt and (full or dt * LONG_RUN >= elapsed):
        return Step(share=1.0, weights=shares(gammas, elapsed, span))
    if not full:
        return Step(share=dt / span, weights=None)
    # Multiples of the golden ratio fill the unit interval evenly from the start, so the dither itself cancels.
    place = NormalDist().inv_cdf(((folds + 1) * _GOLDEN + 0.5) % 1)
    return Step(
        share=dt / span, weights=shares(gammas, elapsed, span), dither=0.0 if exact else _DITHER * place
    )


def shares(gammas: Sequence[float], elapsed: float, span: float) -> list[float]:
    """Share of the last `span` of time in each average."""
    return [step_weight(elapsed, span, gamma) for gamma in gammas]


class Window:
    """The mean of the weights over the time that is not yet in the averages.

    It is kept as its difference to the first average: that is small, and so are the roundings of its many sums.

    Args:
        tracks: The averages, one list a track.
        kinds: Element type of each tensor of weights.
        limit: Most elements that are worked on at a time.

    Attributes:
        difference: The mean less the first average, tensor by tensor.
    """

    def __init__(self, tracks: Sequence[Sequence[Tensor]], kinds: Sequence[torch.dtype], limit: int) -> None:
        self.difference = [torch.zeros_like(x) for x in tracks[0]]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, (x, kind) in enumerate(zip(self.difference, kinds, strict=True)):
            groups.setdefault((x.device, kind), []).append(i)
        lists = [self.difference, *tracks]
        self._parts = [part for indices in groups.values() for part in _cut(indices, lists, limit)]

    def gather(self, tensors: Sequence[Tensor], share: float) -> None:
        """Take weights into the mean.

        Args:
            tensors: All weights, in any type.
            share: Share of these weights, in (0, 1].
        """
        for part in self._parts:
            (difference, first, *_), new = part.views, part.change
            torch._foreach_copy_(
                new, [tensors[i] if rows is None else tensors[i][rows] for i, rows in part.places]
            )
            torch._foreach_sub_(new, first)
            if share == 1.0:
                torch._foreach_copy_(difference, new)
            else:
                torch._foreach_lerp_(difference, new, share)

    def fold(self, weights: Sequence[float], dither: float) -> None:
        """Move every average towards the window's mean.

        Args:
            weights: Share of the window, one a track.
            dither: Part of an average's size that is added wherever it moves; what rests stays as it is.
        """
        for part in self._parts:
            (difference, *tracks), change, moves = part.views, part.change, part.moves
            for track, weight in reversed([*zip(tracks, weights, strict=True)]):
                torch._foreach_copy_(change, difference)
                if track is not tracks[0]:  # which comes last
                    torch._foreach_add_(change, tracks[0])
                    torch._foreach_sub_(change, track)
                torch._foreach_copy_(moves, change)
                torch._foreach_sign_(moves)
                torch._foreach_abs_(moves)
                torch._foreach_mul_(change, weight)
                torch._foreach_addcmul_(change, moves, track, value=dither)
                torch._foreach_add_(track, change)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Tensors, or rows of a large one, that are worked on together, with views of all lists and scratch space."""

    places: list[tuple[int, slice | None]]
    views: list[list[Tensor]]
    change: list[Tensor]
    moves: list[Tensor]


def _cut(indices: Sequence[int], lists: Sequence[Sequence[Tensor]], limit: int) -> list[_Part]:
    groups: list[list[tuple[int, slice | None]]] = []
    room = 0
    for index in indices:
        tensor = lists[0][index]
        for place in _places(index, tensor, limit):
            size = tensor[place[1]].numel() if place[1] else tensor.numel()
            if not groups or size > room:
                groups.append([])
                room = limit
            groups[-1].append(place)
            room -= size
    views = [[[x[i] if rows is None else x[i][rows] for i, rows in group] for x in lists] for group in groups]
    size = max(sum(x.numel() for x in view[0]) for view in views)
    flats = [lists[0][indices[0]].new_empty(size) for _ in range(2)]
    return [
        _Part(places=group, views=view, change=_like(flats[0], view[0]), moves=_like(flats[1], view[0]))
        for group, view in zip(groups, views, strict=True)
    ]


def _places(index: int, tensor: Tensor, limit: int) -> list[tuple[int, slice | None]]:
    if tensor.numel() <= limit or not tensor.dim():
        return [(index, None)]
    rows = max(1, limit * len(tensor) // tensor.numel())
    return [(index, slice(begin, begin + rows)) for begin in range(0, len(tensor), rows)]


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    views, begin = [], 0
    for x in tensors:
        end = begin + x.numel()
        views.append(
            flat.as_strided(x.shape, x.stride(), begin) if _is_dense(x) else flat[begin:end].view(x.shape)
        )
        begin = end
    return views


def _is_dense(tensor: Tensor) -> bool:
    return (
        1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        == tensor.numel()
    )
