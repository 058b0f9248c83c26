"""Stored averages as vectors: solved for coefficients, then added up from their files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from edm2.ema.maths.motion import WHITE, Grid, Motion, fit_motion
from edm2.ema.maths.plans import MOVEMENT
from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.solve import Solution, solve_motion
from edm2.ema.maths.targets import PowerProfile, Profile
from edm2.ema.storage.guarded_json import Range, from_json, read_json
from edm2.ema.storage.manifest import (
    LARGEST_NORM,
    ForeignSnapshots,
    Manifest,
    Snapshot,
    Time,
    Width,
    layout_digest,
)
from edm2.ema.storage.snapshots import open_snapshot
from edm2.ema.storage.tensorfile import TensorFile
from edm2.ema.storage.weighted_sums import WeightedSums, read_tensors, sample_squares

_MOST_JUDGED = 24
_NEGLIGIBLE = 1e-9
_EXACT = 1e-6
_LEAST_SCALE = 2.0**-120


def expected_error(solution: Solution, motion: Motion) -> float:
    """Expected relative L2 error: 2.3 times the motion's estimate, more where the motion is poorly known.

    Ref: docs/ema.md, for the share of true errors below it on random walks and real trainings.
    """
    return float(np.hypot(2.3 * (1.0 + motion.misfit) * solution.moved, 1.1 * solution.rounding))


class StoredAverages:
    """The snapshots of a reconstruction: their profiles, files, and how the weights moved between them.

    Args:
        folder: Where they are.
        manifest: What it holds.
        used: Those that take part, by time.
    """

    def __init__(
        self, folder: str | Path | ForeignSnapshots, manifest: Manifest, used: Sequence[Snapshot]
    ) -> None:
        self._used = used
        self._files = [open_snapshot(folder, manifest.run, s) for s in used]
        foreign = isinstance(folder, ForeignSnapshots)
        described = [_described(f, None if foreign else manifest.layout) for f in self._files]
        self._copied, _, self._complex = described[0]
        self._names = [name for name in self._files[0].specs if name not in self._copied]
        self._scales = [scales for _, scales, _ in described]
        self.write_backs = _write_backs(self._files[-1])
        known = folder.profiles if isinstance(folder, ForeignSnapshots) else {}
        self._profiles: list[Profile] = [
            known.get(s.file) or PowerProfile(s.t - manifest.run.start, s.gamma) for s in used
        ]
        self._interval = folder.interval if isinstance(folder, ForeignSnapshots) else 0.0
        self._norm = used[-1].norm if used[-1].norm > 1 / LARGEST_NORM else 1.0
        self._rounding = np.array([s.rounding * s.norm / self._norm for s in used])

    def solve(self, targets: Sequence[Profile]) -> list[Solution]:
        """Find the coefficients for some profiles."""
        grid = Grid([*self._profiles, *targets])
        judged = _spread(self._used, _MOST_JUDGED)
        squares = sample_squares(
            [self._files[i] for i in judged], self._names, [self._scales[i] for i in judged]
        )
        self.motion = fit_motion(
            grid,
            [self._profiles[i] for i in judged],
            squares / self._norm**2,
            self._rounding[judged],
            np.array([(self._used[i].distance * self._used[i].norm / self._norm) ** 2 for i in judged]),
        )
        return solve_motion(grid, self._profiles, self._rounding, targets, self.motion)

    def expected_error(self, solution: Solution, target: Profile) -> float:
        """Expected relative L2 error of a solution.

        Averages that were updated at intervals hold the weights of single moments. How far these lie from the weights
        around them is in no file, so a typical distance is assumed (docs/ema.md has measurements).
        """
        error = expected_error(solution, self.motion)
        size = float(np.linalg.norm(Grid([target]).column(target, WHITE)))
        interval = self._interval / target.t
        walk = sum(power for kind, power in self.motion.powers.items() if kind.order == 1)
        moments = MOVEMENT * size * math.sqrt(interval)
        return math.hypot(error, 2 * size * interval * math.sqrt(walk / 12), moments) if interval else error

    def least_misfit(self, target: Profile) -> float:
        """Distance of the nearest of all combinations from a profile, whatever its rounding."""
        grid, exact = Grid([*self._profiles, target]), np.full(len(self._profiles), _EXACT)
        return solve_motion(grid, self._profiles, exact, [target], WHITE)[0].profile_misfit

    def add_up(self, coefficients: FloatArray, t: float) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Read the files that count and add them up; buffers come from the last snapshot up to t."""
        last = max(i for i, s in enumerate(self._used) if s.t <= t)
        counts = [i for i, row in enumerate(coefficients) if i == last or np.abs(row).max() > _NEGLIGIBLE]
        files = [self._files[i] for i in counts]
        adder = WeightedSums(files, coefficients[counts], scales=[self._scales[i] for i in counts])
        sums = adder.run(self._names)
        for averaged in sums:
            averaged |= {name: torch.view_as_complex(averaged[name]) for name in self._complex}
        copied: dict[str, Tensor] = {}
        for i, file, data_sum in zip(counts, files, adder.data_sums, strict=True):
            tensors = dict(read_tensors(file, self._copied, data_sum))
            copied = tensors if i == last else copied
            if self._used[i].data_sum and not data_sum.matches(self._used[i].data_sum):
                raise ValueError(
                    f"{file.path} is damaged: its data is not what was written; restore it from a copy"
                )
        return sums, copied


def _described(file: TensorFile, layout: str | None) -> tuple[list[str], dict[str, float], list[str]]:
    """What a file's header says of its tensors.

    Args:
        file: The file.
        layout: Digest that the tensors' names and shapes must have.

    Returns:
        Names of the tensors that are not averaged, factors of those that were divided by one, and names of those that
        are stored as real and imaginary parts.
    """
    copied, scales, pairs = (
        _value(file, key, default) for key, default in (("copied", ""), ("scales", "{}"), ("complex", "[]"))
    )
    specs = file.specs

    def fits(names: Any) -> bool:
        return isinstance(names, list) and all(isinstance(name, str) and name in specs for name in names)

    if not fits(copied):
        raise ValueError(f"{file.path} names copied tensors that it does not hold: restore it from a copy")
    if layout is not None and layout_digest({n: s.shape for n, s in specs.items()}) != layout:
        raise ValueError(f"{file.path} holds other tensors than the manifest says: restore it from a copy")
    if not isinstance(scales, dict) or not all(
        type(x) in (int, float) and _LEAST_SCALE <= x <= 1 / _LEAST_SCALE for x in scales.values()
    ):
        raise ValueError(f"{file.path} has scales that edm2 does not write: restore it from a copy")
    if not fits(pairs) or not all(n not in copied and specs[n].shape[-1:] == (2,) for n in pairs):
        raise ValueError(f"{file.path} names complex tensors that it does not hold: restore it from a copy")
    if not all(spec.dtype.is_floating_point for name, spec in specs.items() if name not in copied):
        raise ValueError(f"{file.path} has averages of whole numbers: restore it from a copy")
    return copied, scales, pairs


@dataclass(frozen=True, kw_only=True)
class _WriteBack:
    t: Time
    sigma_rel: Width | str
    keep: Annotated[float, Range(low=0, high=1)]


def _write_backs(file: TensorFile) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(vars(from_json(_WriteBack, entry)) for entry in _value(file, "write_backs", "[]"))
    except TypeError as error:
        raise ValueError(f"{file.path} is damaged (write_backs, {error}): restore it from a copy") from error


def _value(file: TensorFile, key: str, default: str) -> Any:
    """A JSON value of a file's metadata."""
    try:
        return read_json(file.metadata.get(key, default))
    except ValueError as error:
        raise ValueError(f"{file.path} is damaged ({key}: {error}): restore it from a copy") from error


def _spread(used: Sequence[Snapshot], most: int) -> list[int]:
    """Up to `most` snapshots, the last ones and others evenly spread in time."""
    if len(used) <= most:
        return list(range(len(used)))
    last = [i for i, s in enumerate(used) if s.t == used[-1].t][-most // 2 :]
    rest = np.linspace(0, len(used) - len(last) - 1, most - len(last)).astype(int)
    return sorted({*rest.tolist(), *last})
