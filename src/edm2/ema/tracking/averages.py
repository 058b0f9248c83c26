"""Running averages of a module's tensors, updated in place and accurate in runs of any length.

An update late in a run moves an average by less than one float32 rounding of the average itself, so a plain
float32 average freezes. Two things prevent this:

- Averages are stored as offsets from a base: a bfloat16 copy of the weights that is renewed whenever the training
  time has grown by a quarter. Offsets are a few percent of the weights, and so are their roundings.
- When updates are much shorter than the averages, they first go into the mean of the weights over a short window
  of time, one window for all averages. A full window then goes into each average with its exact share. This also
  costs less: most updates write one buffer instead of one buffer per average.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edm2.ema.maths.plans import WINDOWS_PER_RUN
from edm2.ema.tracking.buffers import Block

Rule = Callable[[float, float], float]
"""Share of the latest `dt` of time in an average: called with the time since training started, and dt."""

_EVENNESS = (
    64  # Within a window all weights count alike; the exact shares differ from that by less than 1/64.
)
_GROWTH = 1.25  # of the training time, after which the base is renewed
_CHECK_EVERY = 100  # updates between checks for NaN


def windows_per_run(gammas: Sequence[float]) -> float:
    """Number of windows in the training so far that keeps power-function averages accurate."""
    return max(WINDOWS_PER_RUN, _EVENNESS * (max(gammas) + 1))


class Averages:
    """Several running averages of the same tensors.

    Args:
        tensors: Local tensors at the start; every average starts as a copy of them.
        names: Their names, for error messages.
        rules: One per average.
        start: Time at which training starts.
        dtype: Element type of the averages.
        windows: Number of windows in the training so far; None averages every update at once.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        names: Sequence[str],
        rules: Sequence[Rule],
        *,
        start: float,
        dtype: torch.dtype,
        windows: float | None,
    ) -> None:
        self._names, self._rules, self._windows = names, rules, windows
        self._start = self._t = self._folded = self._based = start
        self._updates, self._sound_until = 0, start
        self._pending: tuple[Tensor, Any, float] | None = None
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
        self._blocks = [Block(indices, tensors, len(rules), dtype) for indices in groups.values()]
        self._places = {i: (block, place) for block in self._blocks for i, place in block.places.items()}

    def update(self, tensors: Sequence[Tensor], t: float) -> None:
        """Move every average towards the tensors.

        Args:
            tensors: The tensors now, in the order given at the start.
            t: The time now.

        Raises:
            FloatingPointError: If an earlier update brought a NaN or infinity; checked every 100 updates.
        """
        elapsed, dt, span = t - self._start, t - self._t, t - self._folded
        full = self._windows is None or span * self._windows >= elapsed
        shares = self._shares(elapsed, span) if full else None
        if span == dt and elapsed >= _GROWTH * (self._based - self._start):
            for block in self._blocks:
                block.rebase(tensors)
            self._based = t
        for block in self._blocks:
            block.update(tensors, dt / span, shares)
        self._t = t
        self._updates += 1
        if full:
            self._folded = t
        if self._updates % _CHECK_EVERY == 0:
            self._check_later()

    def read(self, track: int) -> Iterator[Tensor]:
        """One average with all updates so far: new tensors, in the order given at the start."""
        share = 0.0
        if self._folded < self._t:
            share = self._rules[track](self._t - self._start, self._t - self._folded)
        for i in range(len(self._places)):
            block, place = self._places[i]
            offset = place.of(block.offsets[track])
            if share:
                assert block.window is not None
                offset = offset.lerp(place.of(block.window), share)
            yield place.of(block.base).to(offset.dtype) - offset

    def check(self) -> None:
        """Raise if an average is not finite; waits for the device.

        Raises:
            FloatingPointError: If one is not.
        """
        self._check_now()

    def _check_now(self) -> None:
        if all(torch.isfinite(total) for total in self._totals()):
            self._sound_until = self._t
            return
        broken = [
            name
            for name, x in zip(self._names, Averages.read(self, 0), strict=True)
            if not torch.isfinite(x).all()
        ]
        raise FloatingPointError(
            f"the average of {broken[0] if broken else self._names[0]!r} is not finite ({len(broken)} of"
            f" {len(self._names)} tensors): the weights held NaN or infinity at an update after t"
            f" {self._sound_until:g}, at t {self._t:g} at the latest, and averages never recover from that; go back to"
            " the last checkpoint with load_state_dict, or to the last snapshot with load_snapshot"
        )

    def parts(self, *, window: bool | None = None) -> dict[str, list[Tensor]]:
        """The running tensors that make up the averages: `base`, `offset.0`, ... and an open `window`.

        Args:
            window: Whether the window is among them. Default: if it is open.
        """
        flats = [
            {"base": b.base, **{f"offset.{i}": x for i, x in enumerate(b.offsets)}} for b in self._blocks
        ]
        if self._folded < self._t if window is None else window:
            for block, named in zip(self._blocks, flats, strict=True):
                named["window"] = block.make_window()
        flat_of = dict(zip(map(id, self._blocks), flats, strict=True))
        ordered = [self._places[i] for i in range(len(self._places))]
        return {key: [place.of(flat_of[id(b)][key]) for b, place in ordered] for key in flats[0]}

    def times(self) -> dict[str, float]:
        """Time up to which windows are in the averages, and time of the base."""
        return {"folded": self._folded, "based": self._based}

    def set_times(self, start: float, t: float, *, folded: float, based: float) -> None:
        """Say what times the content of `parts` belongs to, after it was overwritten."""
        self._start, self._t, self._folded, self._based = start, t, folded, based
        self._sound_until, self._pending = start, None

    def take_over(self, other: "Averages") -> None:
        """Become a copy of other averages of the same tensors, which may be on another device."""
        theirs = other.parts()
        for key, mine in self.parts(window="window" in theirs).items():
            for to, x in zip(mine, theirs[key], strict=True):
                to.copy_(x)
        self.set_times(other._start, other._t, **other.times())

    def adopt(self, averages: Sequence[Sequence[Tensor]], *, start: float, t: float) -> None:
        """Take over averages of all rules as whole tensors, as of time t."""
        for i, (block, place) in self._places.items():
            base = place.of(block.base).copy_(averages[0][i])
            for offsets, average in zip(block.offsets, averages, strict=True):
                place.of(offsets).copy_(base).sub_(average[i].to(base.device))
        self.set_times(start, t, folded=t, based=t)

    def _shares(self, elapsed: float, span: float) -> list[float]:
        return [rule(elapsed, span) for rule in self._rules]

    def _totals(self) -> list[Tensor]:
        """Sums that are finite where the averages are: NaN and infinity stay in every average and in the window."""
        flats = [b.offsets[0] for b in self._blocks]
        if self._folded < self._t:
            flats += [b.window for b in self._blocks if b.window is not None]
        return [x.sum() for x in flats]

    def _check_later(self) -> None:
        """Check without waiting: a device's answer is looked at 100 updates later."""
        if self._pending is not None:
            answer, event, t = self._pending
            event.synchronize()
            if not torch.isfinite(answer).all():
                self._check_now()
            self._pending, self._sound_until = None, t
        totals = self._totals()
        if any(x.is_cuda for x in totals):
            device = next(x.device for x in totals if x.is_cuda)
            answer = torch.empty(len(totals), pin_memory=True)
            answer.copy_(torch.stack([x.to(device, answer.dtype) for x in totals]), non_blocking=True)
            self._pending = (answer, recorded_event(device), self._t)
        else:
            self._check_now()


def recorded_event(device: torch.device) -> Any:
    """An event that passes once the device's stream has done what was queued so far."""
    # The current stream of the process may belong to another device.
    make: Any = torch.cuda.Event
    event = make()
    event.record(torch.cuda.current_stream(device))
    return event
