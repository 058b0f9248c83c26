"""Running averages of a module's tensors, updated in place and accurate in runs of any length.

An update late in a run moves an average by less than one float32 rounding of the average itself, so a plain
float32 average freezes. Two things prevent this:

- Averages are stored as offsets from a base: a bfloat16 copy of the weights that is renewed whenever the training
  time has grown by a quarter. Offsets are a few percent of the weights, and so are their roundings.
- When updates are much shorter than the averages, they first go into the mean of the weights over a short window
  of time, one window for all averages. A full window then goes into each average with its exact share. This also
  costs less: most updates write one buffer instead of one buffer per average.

Within a window the weights count as in the narrowest average. With one average that is exact, so its windows hold 32
updates from the start; so do those of two averages, which have a window each until a common one costs less. The mean
of up to 32 updates is accurate enough without the base, and then costs one pass.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from edm2.ema.maths.plans import WINDOWS_PER_RUN
from edm2.ema.tracking.buffers import Block

Rule = Callable[[float, float], float]
"""Share of the latest `dt` of time in an average: called with the time since training started, and dt."""

_EVENNESS = 64  # Within a window the averages' exact shares differ from one another by less than 1/64.
_MOST_PLAIN = 32  # updates in the plain mean of a window; it lags behind a drift by up to 8 roundings
_MOST_WINDOWS = 4096  # in the training so far: shares of more would be too small for an offset's rounding
_COMMON_FROM = 3  # updates that a common window must hold to cost less than two of their own
_GROWTH = 1.25  # of the training time, after which the base is renewed
_CHECK_EVERY = 100  # updates between checks for NaN


def windows_per_run(gammas: Sequence[float]) -> float:
    """Number of windows in the training so far that keeps power-function averages accurate."""
    return max(WINDOWS_PER_RUN, _EVENNESS * (max(gammas) - min(gammas)))


def window_kinds(windows: int) -> list[str]:
    """What open windows are called in a state: one for all averages, or one for each."""
    return ["window"] if windows == 1 else [f"own_window.{i}" for i in range(windows)]


def open_windows(keys: Collection[str]) -> int:
    """Number of open windows in a tracker's state or in `Averages.parts`, by their keys."""
    kinds = {key.partition(".")[0] for key in keys}
    return 2 if "own_window" in kinds else int("window" in kinds)


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
        self._narrowest = max(rules, key=lambda rule: rule(2.0, 1.0))
        self._start = self._t = self._folded = self._based = start
        self._held = 0  # updates in the open window if it is a plain mean
        self._num_windows = 1  # that are open together: one for all averages, or one for each
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
        if span == dt:
            if elapsed >= _GROWTH * (self._based - self._start):
                for block in self._blocks:
                    block.rebase(tensors)
                self._based = t
            self._held = self._open(elapsed / dt)
        elif self._held:
            self._held += 1
        rules = self._rules if len(self._rules) == self._num_windows else [self._narrowest]
        full = self._is_full(elapsed, span, common=rules is not self._rules)
        shares = [1.0 if span == dt else rule(elapsed, dt) / rule(elapsed, span) for rule in rules]
        weights = [rule(elapsed, span) for rule in self._rules] if full else None
        for block in self._blocks:
            block.update(tensors, shares, weights, plain=self._held > 0)
        self._t = t
        self._updates += 1
        if full:
            self._folded, self._held = t, 0
        if self._updates % _CHECK_EVERY == 0:
            self._check_later()

    def _open(self, updates: float) -> int:
        """Open a window after so many updates; 1 if it is a plain mean, else 0."""
        self._num_windows = len(self._rules) if self._are_apart(updates) else 1
        return int(self._windows is not None and updates <= _MOST_PLAIN * _MOST_WINDOWS)

    def _are_apart(self, updates: float) -> bool:
        """Whether each average has its own window, in which updates count exactly."""
        return len(self._rules) == 1 or (
            len(self._rules) == 2 and self._windows is not None and updates < _COMMON_FROM * self._windows
        )

    def _is_full(self, elapsed: float, span: float, *, common: bool) -> bool:
        if self._windows is None or self._held >= _MOST_PLAIN or span >= 0.5 * elapsed:
            return True
        if self._held:
            return common and span * self._windows >= elapsed
        return span * max(self._windows, _MOST_WINDOWS) >= elapsed

    def mean_of(self, updates: int) -> int:
        """Updates in the plain mean of a window, after so many evenly spaced ones, on average over the run."""
        if self._windows is None:
            return 1
        held = _MOST_PLAIN if self._are_apart(updates) else updates / self._windows
        return math.ceil(min(held, _MOST_PLAIN, _MOST_PLAIN**2 * _MOST_WINDOWS / updates))

    def read(self, track: int, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        """One average with all updates so far: new tensors, in this order, or the one given at the start."""
        share = 0.0
        if self._folded < self._t:
            share = self._rules[track](self._t - self._start, self._t - self._folded)
        for i in range(len(self._places)) if order is None else order:
            block, place = self._places[i]
            offset = place.of(block.offsets[track])
            base = place.of(block.base).to(offset.dtype)
            if share:
                window = place.of(block.windows[track if self._num_windows > 1 else 0])
                offset = offset.lerp(base - window if self._held else window, share)
            yield base - offset

    def check(self) -> None:
        """Raise if an average is not finite; waits for the device.

        Raises:
            FloatingPointError: If one is not.
        """
        if all(torch.isfinite(total) for total in self._totals()):
            self._sound_until = self._t
            return
        broken = [
            name for name, x in zip(self._names, self.read(0), strict=True) if not torch.isfinite(x).all()
        ]
        raise FloatingPointError(
            f"the average of {broken[0] if broken else self._names[0]!r} is not finite ({len(broken)} of"
            f" {len(self._names)} tensors): the weights held NaN or infinity at an update after t"
            f" {self._sound_until:g}, at t {self._t:g} at the latest, and averages never recover from that; go back to"
            " the last checkpoint with load_state_dict, or to the last snapshot with load_snapshot"
        )

    def parts(self, *, windows: int | None = None) -> dict[str, list[Tensor]]:
        """The running tensors that make up the averages: `base`, `offset.0`, ..., and an open `window`.

        A window is the mean of the weights if `times` says that it holds some updates, else an offset. Where each
        average has its own, they are `own_window.0`, ...

        Args:
            windows: Number of windows among them. Default: of those that are open.
        """
        flats = [
            {"base": b.base, **{f"offset.{i}": x for i, x in enumerate(b.offsets)}} for b in self._blocks
        ]
        if windows is None:
            windows = self._num_windows if self._folded < self._t else 0
        if windows:
            for block, named in zip(self._blocks, flats, strict=True):
                named |= zip(window_kinds(windows), block.make_windows(windows), strict=True)
        flat_of = dict(zip(map(id, self._blocks), flats, strict=True))
        ordered = [self._places[i] for i in range(len(self._places))]
        return {key: [place.of(flat_of[id(b)][key]) for b, place in ordered] for key in flats[0]}

    def times(self) -> dict[str, Any]:
        """Time up to which windows are in the averages, time of the base, and updates held in a plain mean."""
        return {"folded": self._folded, "based": self._based, "held": self._held}

    def set_times(self, start: float, t: float, *, folded: float, based: float, held: int = 0) -> None:
        """Say what times the content of `parts` belongs to, after it was overwritten."""
        self._start, self._t, self._folded, self._based, self._held = start, t, folded, based, held
        self._num_windows = max(1, len(self._blocks[0].windows))
        self._sound_until, self._pending = start, None

    def take_over(self, other: "Averages") -> None:
        """Become a copy of other averages of the same tensors, which may be on another device."""
        theirs = other.parts()
        for key, mine in self.parts(windows=open_windows(theirs)).items():
            for to, x in zip(mine, theirs[key], strict=True):
                to.copy_(x)
        self.set_times(other._start, other._t, **other.times())

    def adopt(self, averages: Sequence[Sequence[Tensor]], *, start: float, t: float) -> None:
        """Take over an average for each rule, the first ones of these, as of time t."""
        for i, (block, place) in self._places.items():
            base = place.of(block.base).copy_(averages[0][i])
            for offsets, average in zip(block.offsets, averages, strict=False):
                place.of(offsets).copy_(base).sub_(average[i].to(base.device))
        self.set_times(start, t, folded=t, based=t)

    def _totals(self) -> list[Tensor]:
        """Sums that are finite where the averages are: NaN and infinity stay in every average and in the window."""
        flats = [b.offsets[0] for b in self._blocks]
        if self._folded < self._t:
            flats += [window for b in self._blocks for window in b.windows]
        return [x.sum() for x in flats]

    def _check_later(self) -> None:
        """Check without waiting: a device's answer is looked at 100 updates later."""
        if self._pending is not None:
            answer, event, t = self._pending
            event.synchronize()
            if not torch.isfinite(answer).all():
                self.check()
            self._pending, self._sound_until = None, t
        totals = self._totals()
        if any(x.is_cuda for x in totals):
            device = next(x.device for x in totals if x.is_cuda)
            answer = torch.empty(len(totals), pin_memory=True)
            answer.copy_(torch.stack([x.to(device, answer.dtype) for x in totals]), non_blocking=True)
            self._pending = (answer, recorded_event(device), self._t)
        else:
            self.check()


def recorded_event(device: torch.device) -> Any:
    """An event that passes once the device's stream has done what was queued so far."""
    # The current stream of the process may belong to another device.
    make: Any = torch.cuda.Event
    event = make()
    event.record(torch.cuda.current_stream(device))
    return event


class HostAverages:
    """`Averages` on the CPU: weights are copied through pinned memory, and a thread updates the averages.

    The copy is queued on the current stream, so whatever changes the weights next waits for it. The host goes on
    at once. Everything but an update waits for the update under way.

    Args:
        tensors: Local tensors at the start, on any device.
        arguments: The other arguments of `Averages`.
    """

    def __init__(self, tensors: Sequence[Tensor], *arguments: Any, **options: Any) -> None:
        self._staging = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x.detach()) for x in tensors
        ]
        self._averages = Averages(self._staging, *arguments, **options)
        self._worker = ThreadPoolExecutor(1, "edm2-ema")
        self._running: Future[None] | None = None

    def update(self, tensors: Sequence[Tensor], t: float) -> None:
        """Move every average towards the tensors; returns before that is done."""
        self._finish()
        for to, x in zip(self._staging, tensors, strict=True):
            to.copy_(x, non_blocking=x.is_cuda)
        copied = [recorded_event(device) for device in dict.fromkeys(x.device for x in tensors if x.is_cuda)]
        self._running = self._worker.submit(self._add, copied, t)

    @torch.no_grad()
    def _add(self, copied: Sequence[Any], t: float) -> None:
        for event in copied:
            event.synchronize()
        self._averages.update(self._staging, t)

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __getattr__(self, name: str) -> Any:
        self._finish()
        return getattr(self._averages, name)
