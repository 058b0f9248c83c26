"""The tracker that users hold: power-function averages of a model's weights while it trains."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edm2.ema.callbacks.optimizer import OptimizerHook
from edm2.ema.maths.solve import solve_live
from edm2.ema.storage import snapshots
from edm2.ema.storage.manifest import RunInfo, layout_digest
from edm2.ema.tracking.sharding import full, local, to_owners
from edm2.ema.tracking.tensors import Tensors
from edm2.ema.tracking.tracked import TrackedAverages, Width
from edm2.ema.tracking.wrappers import is_other_replica, unwrapped
from edm2.ema.tracking.writing import TracksToWrite


class PowerEMA(TrackedAverages):
    """Running averages of a model's parameters with power-function profiles.

    Each average weighs the weights at training time tau by `tau**gamma`. You choose the unit of time
    (images, steps, tokens), and updates may come at any interval.

    Args:
        model: Module to follow, or dicts, lists, tuples and dataclasses of tensors and modules. What lies inside the
            outermost one may be made anew at every step. Wrappers (DDP, FSDP2, torch.compile) leave no trace in the
            names. A module with lazy parameters is followed from the first update on.
        sigma_rels: EMA length of each average, as a fraction of training time, in (0, 0.2887]. Default: the paper's
            pair, 0.05 and 0.10.
        plan: A plan or the name of one, such as "compact", instead of `sigma_rels`.
        include: Called with each name and tensor; returns whether to average it. Default: all.
        average_buffers: Average floating-point buffers too, such as the statistics of batch normalisation. Default:
            buffers are copied.
        copied: Names of tensors that are copied instead of averaged, or a function that says so like `include`.
        live: An ordinary EMA to track as well, for use during training: `average("live")`. Snapshots do not hold it.
        clock: Name of the unit of time, stored with the snapshots.
        start: Time at which training starts: 0, or the clock's value where fine-tuning begins.
        run_id: Name of the training run. Snapshots of two runs never share a folder. Default: random, and taken
            over from the state that is loaded.
        dtype: Element type of the averages: float32 (accurate to 1e-6 in runs of any length), or float64.
        device: "cpu" keeps the averages in host memory. Default: the device of the weights.

    Attributes:
        t: Time of the last update.
        steps: Optimiser steps counted by `attach`.

    Raises:
        ValueError: If a setting is out of range, or the model has nothing to average or cannot be followed.

    Ref: EDM2 Sec. 3.1.
    """

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        every: int = 1,
        *,
        snapshot_every: float | None = None,
        folder: str | Path | None = None,
        clock: Callable[[], float] | None = None,
        **options: Any,
    ) -> OptimizerHook:
        """Update after each step of the optimiser, without changing the training loop.

        Steps are counted in `steps`, which `state_dict` holds, so a resumed run continues the count. Load the state of
        this object and of the optimiser in any order, before or after attaching.

        Args:
            optimizer: Any PyTorch optimiser, also one wrapped by Accelerate or Lightning.
            every: Steps between updates.
            snapshot_every: Time between snapshots, in the clock's unit; needs `folder`.
            folder: Folder for them.
            clock: Called at each update; gives the time, such as the images so far. Default: the steps.
            options: More arguments of `snapshot`: dtype, keep, metadata.

        Returns:
            A handle: `finish()` takes in the last steps and writes a last snapshot, `remove()` detaches.

        Raises:
            ValueError: If `every` is below 1, or one of `snapshot_every` and `folder` is missing.
        """
        if (snapshot_every is None) != (folder is None):
            raise ValueError("snapshot_every and folder go together: how often, and where to write snapshots")
        hook = OptimizerHook(self, optimizer, every, clock, folder, options)
        if snapshot_every is not None and folder is not None:
            self.snapshot_every(snapshot_every, folder, **options)
        return hook

    def snapshot_every(self, interval: float, folder: str | Path, **options: Any) -> None:
        """Write a snapshot automatically at the first update at or after each multiple of an interval.

        Args:
            interval: Time between snapshots, in the clock's unit, counted from `start`.
            folder: Folder of this run's snapshots.
            options: More arguments of `snapshot`: dtype, keep, metadata.

        Raises:
            ValueError: If the interval is not above 0.
        """
        if not interval > 0:
            raise ValueError(
                f"the interval between snapshots must be above 0, got {interval:g}: it is in {self.clock}"
            )

        def write_when_due(before: float) -> None:
            if (self.t - self.start) // interval > (before - self.start) // interval:
                self.snapshot(folder, **options)

        self._automatic = write_when_due

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

        Where tensors are sharded, every process must call it. Each one that sees the folder writes some of the
        averages. Of the processes of a `DistributedDataParallel`, the first one writes, whether or not the others
        call it.

        Args:
            folder: Folder of this run's snapshots; made if missing.
            metadata: Anything JSON can hold that describes the run, such as the model's arguments; the same
                at every call.
            dtype: How tensors are stored: fp32, bf16, or fp16 with a scale for each tensor.
            keep: Maximum number of snapshots (files) in the folder; the least useful times are deleted. Default: all.

        Returns:
            The files of this time, one per track; none on processes other than the first.

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
            aliases=self._followed.aliases,
            metadata=metadata,
        )
        self._read_weights()
        self._followed.check_unchanged()
        if isinstance(self._model, nn.Module) and is_other_replica(self._model):
            return []
        self._check()
        tracks = TracksToWrite(
            self._averages,
            self.sigma_rels,
            self._followed,
            updates=self._updates,
            write_backs=self._write_backs,
        )
        averaged = zip(self.names, self._followed.templates, strict=True)
        shapes = {n: tuple(x.shape) for n, x in (*averaged, *tracks.copied.items())}
        path = Path(folder).resolve()
        own_until = math.inf if self._resumed else self._written.get(path, -math.inf)
        write_one = partial(snapshots.write_one, Path(folder), run, t=self.t, dtype=dtype)
        write = partial(
            snapshots.write, Path(folder), run, t=self.t, layout=layout_digest(shapes), keep=keep, own_until=own_until
        )  # fmt: skip
        paths = tracks.write(Path(folder), write_one, lambda make: write(make=make))
        self._written[path] = self.t
        return paths

    @torch.no_grad()
    def average(self, sigma_rel: Width) -> dict[str, Tensor]:
        """An average as it is now, by name; whole tensors on every process where the model is sharded.

        `average_on_first` takes less memory then.

        Args:
            sigma_rel: A tracked EMA length, another one that the tracks together can express, or "live".

        Returns:
            Name -> new tensor.

        Raises:
            ValueError: If the tracks cannot express that length.
            FloatingPointError: If an average is not finite.
        """
        values = zip(list(self._local_average(sigma_rel)), self._followed.templates, strict=True)
        return self._followed.named([full(part, template) for part, template in values])

    @torch.no_grad()
    def average_on_first(self, sigma_rel: Width, names: Iterable[str]) -> Iterator[Tensor | None]:
        """A state of the model with an average as its weights, one tensor at a time, such as for a file.

        Where the model is sharded, all processes must ask for the same names and read to the end. Each then holds no
        more than its part and one whole tensor.

        Args:
            sigma_rel: As in `average`.
            names: Names in the model's `state_dict`; those of tensors that are not averaged give copies.

        Returns:
            Each tensor, whole and on the CPU; None on other processes than the first if the model is sharded.

        Raises:
            ValueError: If the tracks cannot express that length.
            FloatingPointError: If an average is not finite.
        """
        followed, copied, names = self._followed, self._followed.copied(), list(names)
        rank = torch.distributed.get_rank() if followed.is_sharded else 0
        kept = [followed.aliases.get(name, name) for name in names]
        places = {name: i for i, name in enumerate(followed.names)}
        averaged = self._local_average(sigma_rel, [places[name] for name in kept if name in places])

        def gathered() -> Iterator[Tensor | None]:
            for name in kept:
                if name in places:
                    whole = to_owners([next(averaged)], followed.templates[places[name]], [0], rank)
                else:
                    whole = to_owners([local(copied[name])], copied[name].detach(), [0], rank)
                if whole is not None and name in followed.complex_names:
                    whole = torch.view_as_complex(whole.contiguous())
                yield whole

        return gathered()

    def _local_average(self, sigma_rel: Width, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        self._check()
        if sigma_rel == "live":
            if self.live is None:
                raise ValueError("no live average is tracked: build PowerEMA with live=LiveEMA(beta=0.9999)")
            return self._groups["live."].read(0, order)
        if sigma_rel in self.sigma_rels:
            return self._averages.read(self.sigma_rels.index(sigma_rel), order)
        coefficients = torch.from_numpy(solve_live(self.sigma_rels, sigma_rel))
        return (
            torch.stack(parts).mul_(coefficients.to(parts[0]).view(-1, *[1] * parts[0].dim())).sum(0)
            for parts in zip(*(self._averages.read(i, order) for i in range(len(self.gammas))), strict=True)
        )

    @contextmanager
    def applied(self, model: nn.Module | Tensors, sigma_rel: Width) -> Iterator[nn.Module | Tensors]:
        """Run a block with an average in place of the weights, which are restored bit for bit, even after an error.

        Args:
            model: The tracked model, or one with the same tensors.
            sigma_rel: EMA length of the average, or "live".

        Yields:
            The model.

        Raises:
            ValueError: If the model has other tensors, or the tracks cannot express that length.
        """
        weights = self._model_tensors().weights_of(model)
        values = list(self._local_average(sigma_rel))
        saved = [x.detach().clone() for x in weights]
        try:
            _copy(weights, values)
            yield model
        finally:
            _copy(weights, saved)

    @torch.no_grad()
    def module(self, sigma_rel: Width, *, refresh: bool = True) -> nn.Module:
        """A copy of the model with an average as its weights, in evaluation mode, to call like the model.

        The copy is made once for each EMA length and kept.

        Args:
            sigma_rel: EMA length of the average, or "live".
            refresh: Bring the copy up to date; False returns it as it was last.

        Returns:
            The copy, without wrappers; its parameters need no gradients.

        Raises:
            ValueError: If the model is sharded or is not a module, or the tracks cannot express that length.
        """
        model = self._model_tensors().model
        if not isinstance(model, nn.Module) or self._followed.is_sharded:
            raise ValueError(
                "module() copies a whole module, and this model is sharded or a dict of tensors: use applied() or"
                " average()"
            )
        if sigma_rel not in self._modules:
            values = list(self._local_average(sigma_rel))
            made = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
            _copy(self._followed.weights_of(made), values)
            self._modules[sigma_rel] = made
        elif refresh:
            made = self._modules[sigma_rel]
            _copy(self._followed.weights_of(made), list(self._local_average(sigma_rel)))
            for to, x in self._followed.copied_pairs(made):
                to.copy_(x)
        return self._modules[sigma_rel]

    @torch.no_grad()
    def write_to(self, model: nn.Module | Tensors, sigma_rel: Width, keep: float = 0.0) -> None:
        """Load an average into a model; if it is the tracked model, training continues from it.

        Later snapshots and states record it (`Reconstruction.write_backs`): averages stay exact, but the weights made
        a jump at that time.

        Args:
            model: The tracked model, or one with the same tensors.
            sigma_rel: EMA length of the average, or "live".
            keep: Share of the model's own weights that stays, in [0, 1).

        Raises:
            ValueError: If `keep` is out of range, the model has other tensors, or the tracks cannot express the length.
        """
        if not 0 <= keep < 1:
            raise ValueError(
                f"keep {keep:g} must be in [0, 1): the share of the model's own weights that stays"
            )
        weights = self._model_tensors().weights_of(model)
        for weight, value in zip(weights, self._local_average(sigma_rel), strict=True):
            weight.copy_(torch.lerp(value, weight.to(value), keep) if keep else value)
        if model is self._model:
            self._write_backs.append({"t": self.t, "sigma_rel": sigma_rel, "keep": keep})


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for x, y in zip(to, source, strict=True):
        x.copy_(y)
