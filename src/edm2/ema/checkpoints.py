"""Averages of any shape from plain checkpoints, where no EMA was tracked."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.targets import Profile, Target
from edm2.ema.reconstruct import AccuracyWarning, Reconstruction
from edm2.ema.storage.checkpoint_files import find_checkpoints, load_checkpoint
from edm2.ema.storage.encoding import STORED, TYPICAL_ROUNDING

_SAMPLE = 32768
_NEGLIGIBLE = 1e-9
_ROUNDING = {dtype: TYPICAL_ROUNDING[name] for name, dtype in STORED.items()}


def average_checkpoints(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str | Path, float],
    targets: Sequence[float | Target],
    t: float | None = None,
    *,
    start: float = 0,
    key: str | None = None,
    copied: Callable[[str], bool] | None = None,
    clock: str = "steps",
    warn_above: float = 0.01,
) -> list[Reconstruction]:
    """Average checkpoints that lie on disk: each one counts for the time since the one before it.

    Files are read one at a time, in the order of their steps, and only those that count. They do not say which
    tensors are buffers: all floating-point ones are averaged, but for those that `copied` names.

    Args:
        checkpoints: A folder, some files (their steps are in the names), or a mapping from file to step. In a
            folder, what a trainer puts beside a model (the optimiser's state, random numbers) is passed over.
        targets: Widths (`sigma_rel`) or other profiles, in steps.
        t: Step at which the averages end. Default: the last checkpoint's.
        start: Step at which training began; a checkpoint of that step counts for nothing, but tells how far
            the weights moved after it.
        key: Where in torch files the weights are, such as "model". Default: looked for.
        copied: Says of a tensor's name whether it is copied from the last checkpoint, as `PowerEMA` does with
            buffers, and not averaged. Default: the running_mean and running_var of batch normalisation.
            Integers are always copied.
        clock: Unit of steps.
        warn_above: Warn where the expected relative error is larger.

    Returns:
        One average a target. `profile_misfit` is NaN: checkpoints have no profile.

    Raises:
        ValueError: If steps are unclear, files are damaged or of different models, or t is not covered.
    """
    found = find_checkpoints(checkpoints)
    steps = [step for step in found if step >= start]
    t = max(found) if t is None else t
    if not steps or not start < t <= steps[-1]:
        raise ValueError(
            f"t {t:g} must be above start {start:g} and at most the last checkpoint's step, {max(found):g}"
        )
    steps = steps[: next(i for i, step in enumerate(steps) if step >= t) + 1]
    wanted = [x if isinstance(x, Target) else Target.power(x) for x in targets]
    profiles = [w.at(t - start) for w in wanted]
    edges = np.array([0.0, *(min(step, t) - start for step in steps)])
    masses = np.stack([np.diff(p.cumulative(edges)) for p in profiles], axis=1)
    adder = _Adder([found[s] for s in steps], masses, key, copied or _is_statistic)
    adder.run()
    results = []
    for j, target in enumerate(wanted):
        moved = adder.moved(profiles[j], edges, j)
        amplification = float(np.linalg.norm(masses[:, j]))
        rounding = adder.rounding * amplification
        error = math.hypot(2 * moved, 1.1 * rounding)
        if error > warn_above:
            warnings.warn(
                f"{target.label} at t {t:g}: expect a relative error of {error:.1e}; what would help: checkpoints"
                " closer together, or tracking averages with PowerEMA",
                AccuracyWarning,
                stacklevel=2,
            )
        results.append(
            Reconstruction(
                tensors=adder.sums[j] | adder.copied,
                expected_error=error,
                rounding_error=rounding,
                profile_misfit=math.nan,
                amplification=amplification,
                label=target.label,
                sigma_rel=target.sigma_rel,
                t=t,
                coefficients={str(found[s]): float(m) for s, m in zip(steps, masses[:, j], strict=True) if m},
                run_id="",
                clock=clock,
                metadata=None,
            )
        )
    return results


class _Adder:
    """Adds checkpoints up one at a time, and remembers some elements of each to judge how they moved."""

    def __init__(
        self, files: Sequence[Path], masses: FloatArray, key: str | None, is_copied: Callable[[str], bool]
    ) -> None:
        self._files, self._masses, self._key, self._is_copied = files, masses, key, is_copied
        self._samples: dict[int, FloatArray] = {}
        self.sums: list[dict[str, Tensor]] = []
        self.copied: dict[str, Tensor] = {}
        self.rounding = 0.0

    @torch.no_grad()
    def run(self) -> None:
        """Read every file that counts, or comes just before one that does."""
        counts = np.abs(self._masses).max(axis=1) > _NEGLIGIBLE
        needed = counts | np.append(counts[1:], False)
        shapes: dict[str, tuple[int, ...]] = {}
        for i in np.flatnonzero(needed).tolist():
            path = self._files[i]
            tensors = load_checkpoint(path, self._key)
            averaged = {n: x for n, x in tensors.items() if x.is_floating_point() and not self._is_copied(n)}
            if not averaged:
                raise ValueError(
                    f"{path} holds nothing to average: no floating-point tensor that is not copied"
                )
            if not shapes:
                shapes = {n: tuple(x.shape) for n, x in averaged.items()}
                self.sums = [{n: torch.zeros(s) for n, s in shapes.items()} for _ in self._masses.T]
            self._check(path, shapes, averaged)
            for sums, mass in zip(self.sums, self._masses[i].tolist(), strict=True):
                if mass:
                    for name, x in averaged.items():
                        sums[name].add_(x.float(), alpha=mass)
            self._samples[i] = _sample(averaged)
            self.copied = {n: x for n, x in tensors.items() if n not in averaged}
            self.rounding = max(_ROUNDING.get(x.dtype, 0.0) for x in averaged.values())

    def _check(self, path: Path, shapes: dict[str, tuple[int, ...]], averaged: dict[str, Tensor]) -> None:
        given = {n: tuple(x.shape) for n, x in averaged.items()}
        differing = sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n))
        if differing:
            raise ValueError(
                f"{path} is of another model: {len(differing)} tensors are missing, new or of another shape, first"
                f" {differing[0]!r}; leave it out"
            )
        broken = next((n for n, x in averaged.items() if not bool(torch.isfinite(x).all())), None)
        if broken is not None:
            raise ValueError(f"{path} holds values that are not finite in {broken!r}: leave it out")

    def moved(self, profile: Profile, edges: FloatArray, j: int) -> float:
        """Relative L2 error from taking each checkpoint for the whole interval before it.

        Where weights went straight from one checkpoint to the next it is known, and added up with its sign;
        where they wandered between, the parts of all intervals are independent. The way to the first
        checkpoint is unknown: it may have been as long as the weights themselves.
        """
        straight, wandered = np.zeros(1), 0.0
        norm = float(np.linalg.norm(self._samples[max(self._samples)])) or 1.0
        for i in np.flatnonzero(np.abs(self._masses[:, j]) > _NEGLIGIBLE).tolist():
            inside = np.linspace(edges[i], edges[i + 1], 65)
            missed = profile.cumulative((inside[1:] + inside[:-1]) / 2) - profile.cumulative(inside[:1])
            way = self._samples[i] - self._samples.get(i - 1, np.zeros(1))
            straight = straight + missed.mean() * way
            wandered += float(missed.var()) * float(way @ way)
        return math.hypot(float(np.linalg.norm(straight)), math.sqrt(wandered)) / norm


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _sample(tensors: dict[str, Tensor]) -> FloatArray:
    """Evenly spaced elements, each scaled to stand for those between."""
    stride = max(1, sum(x.numel() for x in tensors.values()) // _SAMPLE)
    parts = []
    for _, tensor in sorted(tensors.items()):
        taken = tensor.reshape(-1)[::stride].double().numpy()
        parts.append(taken * math.sqrt(tensor.numel() / max(taken.size, 1)))
    return np.concatenate(parts)
