"""Averages of any length from a folder of snapshots."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edm2.ema.maths.fit_motion import fit_motion
from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.solve import HOPELESS_MISFIT, Solution, solve_motion
from edm2.ema.maths.targets import PowerProfile, Profile, Target
from edm2.ema.maths.weight_motion import WHITE, Grid, Motion
from edm2.ema.storage.distances import sample_squares
from edm2.ema.storage.snapshots import ForeignSnapshots, Manifest, Snapshot, open_snapshot, read_manifest
from edm2.ema.storage.tensorfile import sum_text
from edm2.ema.storage.weighted_sums import WeightedSums, read_tensors

_MOST_JUDGED = 24
_NEGLIGIBLE = 1e-9
_EXACT = 1e-6


class AccuracyWarning(UserWarning):
    """A reconstruction is expected to be further off than wished."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An average that was put together from snapshots.

    Attributes:
        tensors: Name -> tensor: averaged ones float32, copied ones (buffers) as they were; tied tensors
            appear under each of their names. Loads with `model.load_state_dict(result.tensors)`.
        expected_error: Relative L2 error of the averaged tensors to expect, on the safe side.
        rounding_error: The part of it that comes from the stored type.
        profile_misfit: Relative L2 distance between the profile made and the one wanted.
        amplification: How much the rounding of stored averages grows.
        label: What was wanted, in words.
        sigma_rel: Its width, where it is a power function.
        t: Time, in the run's clock.
        coefficients: Weight of each snapshot file.
        run_id: Run that the snapshots are of.
        clock: Unit of t.
        metadata: What was passed to `snapshot(metadata=...)`.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    expected_error: float
    rounding_error: float
    profile_misfit: float
    amplification: float
    label: str
    sigma_rel: float | None
    t: float
    coefficients: dict[str, float] = field(repr=False)
    run_id: str
    clock: str
    metadata: dict[str, Any] | None


def reconstruct(
    folder: str | Path | ForeignSnapshots,
    sigma_rel: float | None = None,
    t: float | None = None,
    *,
    target: Target | None = None,
    warn_above: float = 0.01,
) -> Reconstruction:
    """Put an average of any length together from a folder of snapshots.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote, or a `ForeignSnapshots`.
        sigma_rel: Wanted width as a fraction of training time, in (0, 0.2887].
        t: Time at which the average is wanted. Default: the last snapshot's.
        target: Any other profile, instead of `sigma_rel`.
        warn_above: Warn where the expected relative error is larger.

    Returns:
        The average, with the error to expect.

    Raises:
        ValueError: If the snapshots cannot give that average, or a file is missing or damaged.

    Ref: EDM2 Sec. 3.2.
    """
    if (sigma_rel is None) == (target is None):
        raise ValueError("give one of sigma_rel and target: what average is wanted?")
    wanted = Target.power(sigma_rel) if sigma_rel is not None else target
    assert wanted is not None
    return reconstruct_many(folder, [wanted], t, warn_above=warn_above)[0]


def reconstruct_many(
    folder: str | Path | ForeignSnapshots,
    targets: Sequence[float | Target],
    t: float | None = None,
    *,
    warn_above: float = 0.01,
    read: bool = True,
) -> list[Reconstruction]:
    """Put several averages together in one pass over the files; see `reconstruct`.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        targets: Widths or other profiles.
        t: Time at which they are wanted. Default: the last snapshot's.
        warn_above: Warn where the expected relative error is larger.
        read: False leaves `tensors` empty: coefficients and the error to expect, without reading the files.

    Returns:
        One average a target.
    """
    manifest = read_manifest(folder)
    t = _target_time(folder, manifest, t)
    wanted = [x if isinstance(x, Target) else Target.power(x) for x in targets]
    used = _useful(manifest, t)
    stored = _Stored(folder, manifest, used)
    solutions = stored.solve([w.at(t - manifest.run.start) for w in wanted])
    for target, solution in zip(wanted, solutions, strict=True):
        misfit = solution.profile_misfit
        if (
            misfit > HOPELESS_MISFIT
        ):  # perhaps by choice: coarse snapshots of weights at rest are best averaged
            misfit = stored.least_misfit(target.at(t - manifest.run.start))
        _refuse_hopeless(target, misfit, t, used)
    sums: list[dict[str, Tensor]] = [{} for _ in solutions]
    copied: dict[str, Tensor] = {}
    if read:
        sums, copied = stored.add_up(np.stack([s.coefficients for s in solutions], axis=1), t)
    results = []
    for target, solution, averaged in zip(wanted, solutions, sums, strict=True):
        tensors = {**averaged, **copied}
        tensors |= {alias: tensors[name] for alias, name in manifest.run.aliases.items() if read}
        error = expected_error(solution, stored.motion)
        if error > warn_above:
            warnings.warn(_advice(target, solution, error, used, t), AccuracyWarning, stacklevel=3)
        coefficients = zip((s.file for s in used), solution.coefficients.tolist(), strict=True)
        results.append(
            Reconstruction(
                tensors=tensors,
                expected_error=error,
                rounding_error=solution.rounding,
                profile_misfit=solution.profile_misfit,
                amplification=solution.amplification,
                label=target.label,
                sigma_rel=target.sigma_rel,
                t=t,
                coefficients={file: x for file, x in coefficients if x},
                run_id=manifest.run.run_id,
                clock=manifest.run.clock,
                metadata=manifest.run.metadata,
            )
        )
    return results


def expected_error(solution: Solution, motion: Motion) -> float:
    """Relative L2 error to expect: 2.3 times what the motion says, more where the motion is poorly known.

    docs/ema.md has how many of the true errors lie below it, on random walks and real trainings.
    """
    return float(np.hypot(2.3 * (1.0 + motion.misfit) * solution.moved, 1.1 * solution.rounding))


class _Stored:
    """The snapshots that take part: their profiles, files, and how the weights moved between them."""

    def __init__(
        self, folder: str | Path | ForeignSnapshots, manifest: Manifest, used: Sequence[Snapshot]
    ) -> None:
        self._used = used
        self._files = [open_snapshot(folder, manifest.run, s) for s in used]
        self._copied: list[str] = json.loads(self._files[0].metadata["copied"])
        self._names = [name for name in self._files[0].specs if name not in self._copied]
        self._scales = [json.loads(f.metadata.get("scales", "{}")) for f in self._files]
        self._profiles = [PowerProfile(s.t - manifest.run.start, s.gamma) for s in used]
        self._norm = used[-1].norm or 1.0
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

    def least_misfit(self, target: Profile) -> float:
        """How far the nearest of all combinations is from a profile, whatever rounding does to it."""
        grid, exact = Grid([*self._profiles, target]), np.full(len(self._profiles), _EXACT)
        return solve_motion(grid, self._profiles, exact, [target], WHITE)[0].profile_misfit

    def add_up(self, coefficients: FloatArray, t: float) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Read the files that count and add them up; buffers come from the last snapshot up to t."""
        last = max(i for i, s in enumerate(self._used) if s.t <= t)
        counts = [i for i, row in enumerate(coefficients) if i == last or np.abs(row).max() > _NEGLIGIBLE]
        files = [self._files[i] for i in counts]
        adder = WeightedSums(files, coefficients[counts], scales=[self._scales[i] for i in counts])
        sums = adder.run(self._names)
        copied: dict[str, Tensor] = {}
        for i, file, data_sum in zip(counts, files, adder.data_sums, strict=True):
            total = int(data_sum, 16)
            for name, tensor, words in read_tensors(file, self._copied):
                total += words
                if i == last:
                    copied[name] = tensor
            if self._used[i].data_sum and sum_text(total) != self._used[i].data_sum:
                raise ValueError(
                    f"{file.path} is damaged: its data is not what was written; restore it from a copy"
                )
        return sums, copied


def _target_time(folder: str | Path | ForeignSnapshots, manifest: Manifest, t: float | None) -> float:
    if not manifest.snapshots:
        raise ValueError(f"{folder} holds no snapshot yet: train on until the first one is written")
    times = [s.t for s in manifest.snapshots]
    t = max(times) if t is None else t
    if t > max(times):
        raise ValueError(
            f"t {t:g} is beyond the last snapshot of {folder}, at {max(times):g}: ask for a time up to that"
        )
    if not t >= min(times):
        raise ValueError(
            f"t {t:g} is before the first snapshot of {folder}, at {min(times):g}: ask for a time from that on"
        )
    return t


def _useful(manifest: Manifest, t: float) -> list[Snapshot]:
    """Snapshots up to a time, and those of the next time, which tell of the weights just before it too."""
    later = [s.t for s in manifest.snapshots if s.t > t]
    exact = any(s.t == t for s in manifest.snapshots)
    until = t if exact or not later else min(later)
    return [s for s in manifest.snapshots if s.t <= until]


def _spread(used: Sequence[Snapshot], most: int) -> list[int]:
    """Up to `most` snapshots, the last ones and others evenly spread in time."""
    if len(used) <= most:
        return list(range(len(used)))
    last = [i for i, s in enumerate(used) if s.t == used[-1].t][-most // 2 :]
    rest = np.linspace(0, len(used) - len(last) - 1, most - len(last)).astype(int)
    return sorted({*rest.tolist(), *last})


def _refuse_hopeless(target: Target, misfit: float, t: float, used: Sequence[Snapshot]) -> None:
    widths = sorted({s.sigma_rel for s in used})
    if len(used) == 1 and misfit > 1e-6:
        raise ValueError(
            f"one snapshot only, of sigma_rel {widths[0]:g}, cannot give {target.label}: another track or an"
            " earlier snapshot is needed"
        )
    if misfit > HOPELESS_MISFIT:
        near = f"near {target.sigma_rel:g}" if target.sigma_rel is not None else "like it"
        raise ValueError(
            f"{target.label} at t {t:g} cannot be expressed by these {len(used)} snapshots of widths"
            f" {', '.join(f'{w:g}' for w in widths)} (misfit {misfit:.0%}): choose a target"
            f" nearer to them; it needs another track {near}, or closer snapshots (`edm2.ema.plan` tells which)"
        )


def _advice(target: Target, solution: Solution, error: float, used: Sequence[Snapshot], t: float) -> str:
    tracks = {s.sigma_rel for s in used}
    if solution.rounding > solution.moved:
        help_ = f"storing snapshots as fp32 instead of {used[-1].dtype}"
    elif target.sigma_rel is not None and not min(tracks) <= target.sigma_rel <= max(tracks):
        help_ = f"another track near sigma_rel {target.sigma_rel:g}"
    else:
        help_ = "closer snapshots, or another track"
    return f"{target.label} at t {t:g}: expect a relative error of {error:.1e}; what would help: {help_}"
