"""A model's running averages, their updates and their state."""

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edm2.ema.maths.plans import Plan, named_plan
from edm2.ema.maths.profiles import sigma_rel_to_gamma, step_weight
from edm2.ema.tracking.averages import Averages, HostAverages, open_windows, window_kinds, windows_per_run
from edm2.ema.tracking.sharding import like_shard, raise_together, shard_of
from edm2.ema.tracking.state import FORMAT, check_state, stored_tracks, upgraded
from edm2.ema.tracking.tensors import (
    Choice,
    FollowedModel,
    Include,
    Tensors,
    check_names,
    is_unfinished,
    real,
)


@dataclass(frozen=True, kw_only=True)
class LiveEMA:
    """An exponential average with constant decay after a warm-up; it is available at any time.

    The decay of step k, counted from `update_after_step`, is `1 - (1 + k / inv_gamma)**-power`, kept between
    `min_value` and `beta`. Until `update_after_step` the average is a copy of the weights. An update that comes
    after n steps applies the decay of n steps.

    Attributes:
        beta: Largest decay per unit of the clock, in [0, 1).
        update_after_step: Time up to which the weights are copied, in the clock's unit.
        inv_gamma: Pace of the warm-up; None for a constant decay from the start.
        power: Exponent of the warm-up: 2/3 for long trainings, 3/4 for shorter ones.
        min_value: Smallest decay, in [0, beta].

    Raises:
        ValueError: If a setting is out of range.
    """

    beta: float = 0.9999
    update_after_step: float = 0
    inv_gamma: float | None = 1.0
    power: float = 2 / 3
    min_value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_value <= self.beta < 1:
            raise ValueError(
                f"min_value {self.min_value:g} and beta {self.beta:g} must satisfy 0 <= min_value <= beta < 1: 0.9999"
                " is a usual beta"
            )
        if self.inv_gamma is not None and not (self.inv_gamma > 0 and self.power > 0):
            raise ValueError(
                f"inv_gamma {self.inv_gamma:g} and power {self.power:g} must be above 0: inv_gamma=None switches the"
                " warm-up off"
            )

    def share(self, elapsed: float, dt: float) -> float:
        """Share of the latest `dt` of time in the average."""
        step = elapsed - self.update_after_step - 1
        if step <= 0:
            return 1.0
        warm = 1.0 if self.inv_gamma is None else 1 - (1 + step / self.inv_gamma) ** -self.power
        value = min(max(warm, self.min_value), self.beta)
        return -math.expm1(dt * math.log(value)) if value else 1.0


Width = float | Literal["live"]
"""An average by its EMA length, or the live one."""


class TrackedAverages:
    """The running averages of a model, their updates and their state; see `PowerEMA`."""

    def __init__(
        self,
        model: nn.Module | Tensors,
        sigma_rels: Sequence[float] | None = None,
        *,
        plan: Plan | str | None = None,
        include: Include | None = None,
        average_buffers: bool = False,
        copied: Include | Collection[str] = (),
        live: LiveEMA | None = None,
        clock: str = "steps",
        start: float = 0,
        run_id: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        if plan is not None and sigma_rels is not None:
            raise ValueError("give one of sigma_rels and plan: a plan says which EMA lengths are tracked")
        if sigma_rels is None:
            sigma_rels = (plan if isinstance(plan, Plan) else named_plan(plan or "paper")).sigma_rels
        self.sigma_rels = tuple(float(s) for s in sigma_rels)
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"sigma_rels needs one or more different EMA lengths, got {self.sigma_rels}")
        self.gammas = tuple(sigma_rel_to_gamma(s) for s in self.sigma_rels)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype {dtype} is too coarse for averages, whose changes are far smaller than they are: choose"
                " torch.float32 or torch.float64; snapshots may be stored in a smaller one"
            )
        if device not in (None, "cpu"):
            raise ValueError(
                f"device {device!r} is not known: None keeps averages on the weights' device, 'cpu' in host memory"
            )
        self.clock, self.start, self.live = clock, start, live
        self.run_id = secrets.token_hex(8) if run_id is None else run_id
        self.t: float = start
        self.steps = self._updates = 0
        self._dtype, self._device = dtype, device
        self._model = model
        self._choice = Choice(include=include, copied=copied, average_buffers=average_buffers)
        self._resumed = False
        self._written: dict[Path, float] = {}
        self._write_backs: list[dict[str, Any]] = []
        self._automatic: Callable[[float], None] = lambda before: None
        self._modules: dict[Width, nn.Module] = {}
        if not is_unfinished(model):
            self._begin()

    def _begin(self) -> None:
        """Take up the model, once its tensors have their shapes."""
        self._followed = FollowedModel(self._model, self._choice)
        self._groups = self._make_averages()

    def _make_averages(self) -> dict[str, Averages]:
        """The power-function averages and the live one, by the prefix of their tensors in the state."""
        weights = self._followed.weights
        offload = self._device == "cpu" and any(x.device.type != "cpu" for x in weights)
        kind: Any = HostAverages if offload else Averages
        make = partial(kind, weights, self._followed.names, start=self.start, dtype=self._dtype)
        rules = [partial(step_weight, gamma=gamma) for gamma in self.gammas]
        windows = None if self._dtype == torch.float64 else windows_per_run(self.gammas)
        made = {"": make(rules, windows=windows)}
        return made if self.live is None else made | {"live.": make([self.live.share], windows=None)}

    @property
    def _averages(self) -> Averages:
        return self._groups[""]

    def _model_tensors(self) -> FollowedModel:
        """The followed tensors, taken up now if the model had lazy parameters."""
        if not hasattr(self, "_followed"):
            self._begin()
        return self._followed

    @property
    def names(self) -> list[str]:
        """Names of the averaged tensors."""
        return self._model_tensors().names

    @torch.no_grad()
    def update(self, t: float) -> None:
        """Take the weights as they are now into the averages; call it after the optimiser's step.

        Args:
            t: Training time, in the clock's unit; must be finite and grow from call to call.

        Raises:
            ValueError: If t does not grow or is not finite, or a tensor went away or changed its shape.
            FloatingPointError: If a NaN or infinity came into the averages, at most 200 updates later. `snapshot`,
                `average` and `state_dict` check at once.
        """
        t = t if isinstance(t, int | float) else float(t)
        if not self.t < t < math.inf:
            raise ValueError(
                f"update({t:g}) after time {self.t:g}: t must increase from update to update, and be finite;"
                " call it once after each optimiser step with the total so far, and load_state_dict when resuming"
            )
        weights = self._read_weights()
        for averages in self._groups.values():
            averages.update(weights, t)
        before, self.t = self.t, t
        self._updates += 1
        self._automatic(before)

    def _read_weights(self) -> list[Tensor]:
        """Local weights as they are now; the averages follow them to another device or type."""
        if self._model_tensors().read():
            old, self._groups = self._groups, self._make_averages()
            for prefix, averages in self._groups.items():
                averages.take_over(old[prefix])
        return self._followed.weights

    def _check(self) -> None:
        """Raise FloatingPointError if an average is not finite."""
        templates = self._model_tensors().templates
        for averages in self._groups.values():
            raise_together(averages.check, templates)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: one flat dict of tensors and JSON values.

        An average is stored as `base` minus its `offset`; weights that are not in the averages yet as one `window`, or
        as a window for each average. Tensors are the running ones: copy what must not change. Where tensors are
        sharded, every process must call it.

        Raises:
            FloatingPointError: If an average is not finite; the state saved before is the way back.
        """
        self._check()
        state: dict[str, Any] = {
            **self._settings(),
            "run_id": self.run_id,
            "start": self.start,
            "t": self.t,
            "steps": self.steps,
            "updates": self._updates,
            "write_backs": list(self._write_backs),
            **self._averages.times(),
        }
        if self.live is not None:
            state["live_based"] = self._groups["live."].times()["based"]
        return state | {key: like_shard(part, template) for key, (part, template) in self._parts().items()}

    def _settings(self) -> dict[str, Any]:
        live = None if self.live is None else asdict(self.live)
        return {"format": FORMAT, "clock": self.clock, "sigma_rels": list(self.sigma_rels), "live": live}

    def _parts(self, *, windows: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Local running tensors by key, each with the tensor of the model that it is about."""
        return {
            f"{prefix}{key}.{name}": (part, template)
            for prefix, averages in self._groups.items()
            for key, parts in averages.parts(windows=None if prefix else windows).items()
            for name, part, template in zip(self.names, parts, self._followed.templates, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, run id and time included.

        Args:
            state: What `state_dict` returned; its tensors sharded like the model's, or whole.

        Raises:
            ValueError: If it is of other tracks, another clock or another model, or incomplete; nothing is loaded
                then.
            FloatingPointError: If it holds NaN or infinity; the averages are unusable then.
        """
        state = upgraded(state)
        self._model_tensors()
        # Only two averages have windows of their own; a state that says otherwise has tensors too many.
        windows = min(open_windows(state), 2 if len(self.sigma_rels) == 2 else 1)
        like = {key: template for key, (_, template) in self._parts(windows=0).items()}
        for kind in window_kinds(windows):
            like |= {f"{kind}.{n}": x for n, x in zip(self.names, self._followed.templates, strict=True)}
        check_state(state, self._settings(), like)
        parts = self._parts(windows=windows)
        for key, (part, template) in parts.items():
            part.copy_(shard_of(state[key], template))
        keys = ("run_id", "start", "t", "steps", "updates", "write_backs")
        self._resume(**{key: state[key] for key in keys})
        times = {key: state[key] for key in ("folded", "based", "held")}
        self._averages.set_times(self.start, self.t, **times)
        if self.live is not None:
            self._groups["live."].set_times(self.start, self.t, folded=self.t, based=state["live_based"])
        self._check()

    @torch.no_grad()
    def load_snapshot(self, folder: str | Path, t: float | None = None) -> None:
        """Continue from the averages in a folder of snapshots, as after weights that turned NaN.

        The model's own weights are not in snapshots: load your checkpoint of that time, or go on from an average with
        `write_to`. A live average starts anew from the first track.

        Args:
            folder: Folder that `snapshot` wrote with these tracks.
            t: Time of the snapshot. Default: the last one.

        Raises:
            ValueError: If the folder has no snapshot of these tracks at that time, another clock, or another model.
        """
        run, results = stored_tracks(folder, self.sigma_rels, t)
        if run.clock != self.clock:
            raise ValueError(
                f"{folder} counts {run.clock!r}, this tracker {self.clock!r}: build the PowerEMA with the clock of"
                " the run"
            )
        followed = self._model_tensors()
        averages = []
        for result in results:
            check_names([n for n in result.tensors if n in set(followed.names)], followed.names)
            whole = [real(result.tensors[name]) for name in followed.names]
            averages.append(
                [shard_of(x, template) for x, template in zip(whole, followed.templates, strict=True)]
            )
        t = results[0].t
        self._resume(
            run_id=run.run_id, start=run.start, t=t, steps=round(t - run.start), updates=round(t - run.start),
            write_backs=results[0].write_backs,
        )  # fmt: skip
        for group in self._groups.values():
            group.adopt(averages, start=self.start, t=self.t)

    def _resume(
        self,
        *,
        run_id: str,
        start: float,
        t: float,
        steps: int,
        updates: int,
        write_backs: Sequence[dict[str, Any]],
    ) -> None:
        self.run_id, self.start, self.t, self.steps, self._updates = run_id, start, t, steps, updates
        self._write_backs = [dict(x) for x in write_backs]
        self._resumed = True
