"""Power-function averages of a module's weights, tracked while it trains."""

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edm2.ema.maths.plans import Plan, named_plan
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.maths.solve import solve_live
from edm2.ema.storage import snapshots
from edm2.ema.storage.encoding import Track, arithmetic_rounding
from edm2.ema.storage.manifest import RunInfo, layout_digest
from edm2.ema.tracking.averages import Averages
from edm2.ema.tracking.offload import HostAverages
from edm2.ema.tracking.sharding import distance, is_other_replica, write_from_first
from edm2.ema.tracking.state import check_state
from edm2.ema.tracking.tensors import (
    Include,
    check_names,
    check_same,
    collect,
    full,
    is_sharded,
    like_shard,
    local,
    shard_of,
)
from edm2.ema.tracking.window import next_step, shares

_FORMAT = "edm2.ema.PowerEMA/1"

_kind = attrgetter("shape", "device", "dtype")  # in one call, as it is asked of every tensor at every update


class PowerEMA:
    """Running averages of a module's parameters with power-function profiles.

    Each average weighs the weights at training time tau by `tau**gamma`. Time is what the caller says it is
    (images, steps, tokens), so updates may come at any interval. Buffers are copied, never averaged.

    Args:
        model: Module to follow. Wrappers (DDP, FSDP2, torch.compile) leave no trace in the names.
        sigma_rels: Width of each average as a fraction of training time, in (0, 0.2887]. Default: the paper's
            pair, 0.05 and 0.10.
        plan: A plan or the name of one, such as "compact", instead of `sigma_rels`.
        include: Called with each clean name and tensor; says which take part. Default: all.
        clock: Unit of time, a word for the reader of the snapshots.
        start: Time at which training starts: 0, or the clock's value where fine-tuning begins.
        run_id: Name of the training run. Snapshots of two runs never share a folder. Default: random, and taken
            over from the state that is loaded.
        dtype: Element type of the averages; float64 for exact ones at twice the memory.
        device: "cpu" keeps the averages in the host's memory. Default: beside the weights.

    Raises:
        ValueError: If a width is out of range or given twice, or the module has nothing to average.

    Ref: EDM2 Sec. 3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] | None = None,
        *,
        plan: Plan | str | None = None,
        include: Include | None = None,
        clock: str = "steps",
        start: float = 0,
        run_id: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        if plan is not None and sigma_rels is not None:
            raise ValueError("give one of sigma_rels and plan: a plan says which widths are tracked")
        if sigma_rels is None:
            sigma_rels = (plan if isinstance(plan, Plan) else named_plan(plan or "paper")).sigma_rels
        self.sigma_rels = tuple(float(s) for s in sigma_rels)
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"sigma_rels needs one or more different widths, got {self.sigma_rels}")
        self.gammas = tuple(sigma_rel_to_gamma(s) for s in self.sigma_rels)
        self.clock, self.start = clock, start
        self.run_id = secrets.token_hex(8) if run_id is None else run_id
        self.t: float = start
        self._updates = 0
        self._folded: float = start
        self._folds = 0
        self._resumed = False
        self._written: dict[Path, float] = {}
        self._model = model
        self._include = include
        self._tensors = collect(model, include)
        self._templates = [slot.get() for slot in self._tensors.averaged]
        self._kinds = _kinds(self._templates)
        weights = [local(x) for x in self._templates]
        self._is_sharded = any(is_sharded(x) for x in self._templates)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype {dtype} is too coarse for averages, whose changes are far smaller than they are: choose"
                " torch.float32 or torch.float64; snapshots may be stored in a smaller one"
            )
        self._exact = dtype == torch.float64
        if device not in (None, "cpu"):
            raise ValueError(
                f"device {device!r} is not known: None keeps averages beside the weights, 'cpu' in host"
                " memory"
            )
        offload = device == "cpu" and any(x.device.type != "cpu" for x in weights)
        kind = HostAverages if offload else Averages
        self._averages = kind(weights, len(self.sigma_rels), dtype=dtype)

    @property
    def names(self) -> list[str]:
        """Names of the averaged tensors."""
        return [slot.name for slot in self._tensors.averaged]

    @torch.no_grad()
    def update(self, t: float) -> None:
        """Take the weights as they are now into the averages; call it after the optimiser's step.

        Args:
            t: Training time, in the clock's unit; must be finite and grow from call to call.

        Raises:
            ValueError: If t does not grow or is not finite, or a tensor went away or changed its shape, device or type.
        """
        t = t if isinstance(t, int | float) else float(t)
        if not self.t < t < math.inf:
            raise ValueError(
                f"update({t:g}) after time {self.t:g}: t must increase from update to update, and be finite;"
                " call it once after each optimiser step with the total so far, and load_state_dict when resuming"
            )
        current = self._current()
        step = next_step(
            self.gammas, elapsed=t - self.start, dt=t - self.t, span=t - self._folded, folds=self._folds,
            exact=self._exact,
        )  # fmt: skip
        self._averages.update(current, step)
        self.t = t
        self._updates += 1
        if step.weights is not None:
            self._folds += step.share < 1.0
            self._folded = t

    def _current(self) -> list[Tensor]:
        """Local weights as they are now, found anew each time: frameworks replace tensors and their storage."""
        tensors = [slot.get() for slot in self._tensors.averaged]
        kinds = _kinds(tensors)
        if kinds != self._kinds:
            pairs = zip(self.names, kinds, self._kinds, strict=True)
            name, new, old = next((n, new, old) for n, new, old in pairs if new != old)
            raise ValueError(
                f"tensor {name!r} changed from {_words(*old)} to {_words(*new)}: an average needs the same"
                " tensors throughout; build a new PowerEMA, and only once the model is where it trains"
            )
        self._templates = tensors
        return [local(x) for x in tensors] if self._is_sharded else tensors

    @torch.no_grad()
    def snapshot(
        self,
        folder: str | Path,
        *,
        metadata: dict[str, Any] | None = None,
        dtype: str = "fp32",
        keep: int | None = None,
    ) -> list[Path]:
        """Add the averages as they are now to a folder of snapshots.

        Where tensors are sharded, every process must call it, and the first one writes. Of the processes of a
        `DistributedDataParallel`, the first one writes, whether or not the others call it.

        Args:
            folder: Folder of this run's snapshots; made where there is none.
            metadata: Anything JSON can hold that describes the run, such as the model's arguments; the same
                at every call.
            dtype: How tensors are stored: fp32, bf16, or fp16 with a scale for each tensor.
            keep: Most snapshots (files) that the folder holds; the least useful times are given up. Default: all.

        Returns:
            The files of this time, one a track; none on processes that do not write.

        Raises:
            ValueError: If there was no update yet, the model is no longer the one that is averaged, the folder
                holds another run, or this run's snapshots from a state that was not loaded, or one time's
                snapshots are more than `keep`.
            FloatingPointError: If an average is not finite.
            OSError: If it cannot be written; the folder then holds what it held before.
        """
        if self.t == self.start:
            raise ValueError(
                "snapshot before the first update: there is no average yet; call update(t) first"
            )
        if keep is not None and keep < len(self.sigma_rels):
            raise ValueError(
                f"keep {keep} has no room for the {len(self.sigma_rels)} tracks of one time: keep more"
            )
        run = RunInfo(
            run_id=self.run_id,
            clock=self.clock,
            start=self.start,
            aliases=self._tensors.aliases,
            metadata=metadata,
        )
        weights = self._current()
        check_same(collect(self._model, self._include), self._tensors)
        if is_other_replica(self._model):
            return []
        copied = {slot.name: slot.get() for slot in self._tensors.copied}
        shapes = {n: tuple(x.shape) for n, x in zip(self.names, self._templates, strict=True)}
        tracks = (
            Track(
                sigma_rel=sigma_rel,
                averaged=self._whole(averages),
                copied=copied,
                distance=distance(averages, weights, self._templates),
                arithmetic=arithmetic_rounding(self._updates, sigma_rel),
            )
            for sigma_rel, averages in zip(
                self.sigma_rels, (list(self._read(i)) for i in range(len(self.gammas))), strict=True
            )
        )
        layout = layout_digest({**shapes, **{n: tuple(x.shape) for n, x in copied.items()}})

        path = Path(folder).resolve()
        own_until = math.inf if self._resumed else self._written.get(path, -math.inf)

        def write() -> list[Path]:
            return snapshots.write(
                Path(folder), run, layout=layout, t=self.t, tracks=tracks, dtype=dtype, keep=keep,
                own_until=own_until,
            )  # fmt: skip

        paths = write_from_first(write, tracks, self._templates)
        self._written[path] = self.t
        return paths

    def _whole(self, averages: list[Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name, gathered where they are sharded."""
        return {
            name: full(part, template).cpu()
            for name, part, template in zip(self.names, averages, self._templates, strict=True)
        }

    def average(self, sigma_rel: float) -> dict[str, Tensor]:
        """An average as it is now, by name; whole tensors where the model is sharded.

        Args:
            sigma_rel: A tracked width, or another one that the tracks together can express.

        Returns:
            Name -> tensor; those of a tracked width are the running averages: copy what must not change.

        Raises:
            ValueError: If that width cannot be had.
        """
        averages = self._local_average(sigma_rel)
        return {n: full(a, p) for n, a, p in zip(self.names, averages, self._templates, strict=True)}

    def _read(self, track: int) -> Iterator[Tensor]:
        """Local parts of an average, with the updates that are still in the window."""
        share = 0.0
        if self._folded < self.t:
            (share,) = shares([self.gammas[track]], self.t - self.start, self.t - self._folded)
        return self._averages.read(track, share)

    def _local_average(self, sigma_rel: float) -> list[Tensor]:
        if sigma_rel in self.sigma_rels:
            return list(self._read(self.sigma_rels.index(sigma_rel)))
        coefficients = torch.from_numpy(solve_live(self.sigma_rels, sigma_rel))
        return [
            torch.stack(parts).mul_(coefficients.to(parts[0]).view(-1, *[1] * parts[0].dim())).sum(0)
            for parts in zip(*(self._read(i) for i in range(len(self.gammas))), strict=True)
        ]

    @contextmanager
    def applied(self, model: nn.Module, sigma_rel: float) -> Iterator[nn.Module]:
        """Run a block with an average as the weights, which come back bit for bit, also after an error.

        Args:
            model: The module tracked, or one with the same tensors.
            sigma_rel: Width of the average.

        Yields:
            The model.

        Raises:
            ValueError: If the model has other tensors, or that width cannot be had.
        """
        found = collect(model, self._include)
        if model is self._model:
            check_same(found, self._tensors)
        given = {slot.name: slot.get() for slot in found.averaged}
        check_names(given, self.names)
        weights = [local(given[name]) for name in self.names]
        values = self._local_average(sigma_rel)
        for name, weight, value in zip(self.names, weights, values, strict=True):
            if weight.shape != value.shape:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(weight.shape)} in the model, its average {tuple(value.shape)}:"
                    " the averages fit the model that was tracked, or one made and spread over processes like it"
                )
        saved = [x.detach().clone() for x in weights]
        try:
            _copy(weights, values)
            yield model
        finally:
            _copy(weights, saved)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: one flat dict of tensors and JSON values.

        Keys of tensors begin with `average.`, in long runs also with `window.` (weights that are not in the
        averages yet). Tensors are the running ones: copy what must not change.
        """
        state: dict[str, Any] = {
            **self._settings(),
            "run_id": self.run_id,
            "start": self.start,
            "t": self.t,
            "updates": self._updates,
            "folded": self._folded,
            "folds": self._folds,
        }
        for key, (part, template) in self._parts(window=self._folded < self.t).items():
            state[key] = like_shard(part, template) if is_sharded(template) else part
        return state

    def _settings(self) -> dict[str, Any]:
        return {"format": _FORMAT, "clock": self.clock, "sigma_rels": list(self.sigma_rels)}

    def _parts(self, *, window: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Local parts of the averages and of the window, by key, with the tensors that they are parts of."""
        lists = {f"average.{i}": averages for i, averages in enumerate(self._averages.tracks)}
        if window:
            lists["window"] = self._averages.make_window().difference
        return {
            f"{prefix}.{name}": (part, template)
            for prefix, parts in lists.items()
            for name, part, template in zip(self.names, parts, self._templates, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, run id and time included.

        Args:
            state: What `state_dict` gave; its tensors sharded like the model's, or whole.

        Raises:
            ValueError: If it is of other tracks, another clock, or another model, or not whole; nothing is loaded
                then.
        """
        parts = self._parts(window=any(key.startswith("window.") for key in state))
        check_state(state, self._settings(), {key: template for key, (_, template) in parts.items()})
        for key, (part, template) in parts.items():
            part.copy_(shard_of(state[key], template))
        self.run_id, self.start, self.t = state["run_id"], state["start"], state["t"]
        self._updates, self._folds = state["updates"], state.get("folds", 0)
        self._folded = state.get("folded", self.t)
        self._resumed = True


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.device, torch.dtype]]:
    return [*map(_kind, tensors)]


def _words(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for x, y in zip(to, source, strict=True):
        x.copy_(y)
