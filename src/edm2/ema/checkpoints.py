"""Averages of any shape from plain checkpoints, where no EMA was tracked."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.ema.maths.profiles import FloatArray
from edm2.ema.maths.targets import Profile, Target
from edm2.ema.reconstruct import AccuracyWarning, Reconstruction
from edm2.ema.storage.checkpoint_files import Checkpoint, find_checkpoints, open_checkpoint
from edm2.ema.storage.encoding import STORED, TYPICAL_ROUNDING
from edm2.ema.storage.guarded_json import read_json
from edm2.ema.storage.replacing import replacing_folder
from edm2.ema.storage.tensorfile import TensorSpec

_SAMPLE = 32768
_NEGLIGIBLE = 1e-9
_RECORD = "merged.json"
# What describes a model in the folder of a checkpoint.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".yaml", ".md")
_TRAINER = ("trainer_state.json", _RECORD)
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
    """Average checkpoints on disk, where each one counts for the time since the one before it.

    Only checkpoints that count are read, tensor by tensor. Nothing in them is executed: safetensors hold no code, and
    torch files are loaded with `weights_only=True`. They do not say which tensors are buffers, so all floating-point
    ones are averaged, except those that `copied` names.

    Args:
        checkpoints: A folder, some checkpoints (their steps are in the names), or a mapping from checkpoint to step.
            In a folder, what a trainer stores with a model (the optimiser's state, random numbers) is left out. A
            checkpoint is a file (safetensors or torch), a folder of sharded safetensors with their index, or one of
            `torch.distributed.checkpoint`.
        targets: EMA lengths (`sigma_rel`) or other profiles, in steps.
        t: Step at which the averages end. Default: the last checkpoint's.
        start: Step at which training began; a checkpoint of that step counts for nothing, but tells how far
            the weights moved after it.
        key: Where in torch files the weights are, such as "model". Default: found automatically.
        copied: Called with a tensor's name; returns whether to copy the tensor from the last checkpoint instead of
            averaging it, as `PowerEMA` does with buffers. Default: the running_mean and running_var of batch
            normalisation. Integers are always copied.
        clock: Unit of steps.
        warn_above: Warn where the expected relative error is larger.

    Returns:
        One average per target. `profile_misfit` is NaN: checkpoints have no profile.

    Raises:
        ValueError: If steps are unclear, files are damaged or of different models, or t is not covered.
    """
    merge = _Merge(checkpoints, targets, t, start=start, key=key, copied=copied)
    tensors: list[dict[str, Tensor]] = [{} for _ in targets]
    for name in merge.adder.averaged:
        for found, total in zip(tensors, merge.adder.sums(name), strict=True):
            found[name] = total
    rest = merge.adder.copied()
    return [merge.result(j, found | rest, clock, warn_above) for j, found in enumerate(tensors)]


def merge_checkpoints(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str | Path, float],
    targets: Sequence[float | Target],
    outs: Sequence[str | Path],
    t: float | None = None,
    *,
    start: float = 0,
    key: str | None = None,
    copied: Callable[[str], bool] | None = None,
    warn_above: float = 0.01,
) -> list[tuple[Path, float]]:
    """Average checkpoints as `average_checkpoints` does, and write each average as the last checkpoint is stored.

    Tensors are read, averaged and written one at a time: memory holds one average and one tensor. Names,
    types, shards and the index are those of the last checkpoint; its configuration files come along. Averages of torch
    files are written as safetensors.

    Args:
        checkpoints: See `average_checkpoints`.
        targets: EMA lengths or other profiles, in steps.
        outs: A folder for each target. It appears when it is whole; a folder that holds the same merge is kept.
        t: Step at which the averages end. Default: the last checkpoint's.
        start: Step at which training began.
        key: Where the weights are in files that hold more.
        copied: Called with a tensor's name; returns whether to copy it from the last checkpoint.
        warn_above: Warn if the expected relative error is larger.

    Returns:
        Each folder, with the expected relative L2 error.

    Raises:
        ValueError: As in `average_checkpoints`.
        FileExistsError: If a folder exists and holds something else.
        OSError: If a folder cannot be written.
    """
    merge = _Merge(checkpoints, targets, t, start=start, key=key, copied=copied)
    adder, model = merge.adder, merge.adder.last.model
    clean = {old: new for new, old in adder.last.stored.items()}
    folders = [Path(out) for out in outs]
    missing = [j for j, folder in enumerate(folders) if not merge.is_done(j, folder)]
    results = []
    for j, folder in enumerate(folders):
        if j in missing:  # one pass each, as files are written in their own order

            def value(name: str, j: int = j) -> Tensor:
                averaged = clean.get(name) in adder.averaged
                return adder.sums(clean[name], only=j)[0] if averaged else model.read(name)

            with replacing_folder(folder) as aside:
                written = {path.name for path in model.write_like(aside, value)}
                _copy_beside(adder.last.path, aside, written)
                result = merge.result(j, {}, "steps", warn_above)
                record = merge.record(j) | {"expected_error": result.expected_error}
                (aside / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            results.append((folder, result.expected_error))
        else:
            results.append((folder, float(read_json(folder / _RECORD)["expected_error"])))
    return results


class _Merge:
    """Which checkpoints count how much for some targets."""

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path] | Mapping[str | Path, float],
        targets: Sequence[float | Target],
        t: float | None,
        *,
        start: float,
        key: str | None,
        copied: Callable[[str], bool] | None,
    ) -> None:
        found = find_checkpoints(checkpoints)
        steps = [step for step in found if step >= start]
        self.t = t = max(found) if t is None else t
        if not steps or not start < t <= steps[-1]:
            raise ValueError(
                f"t {t:g} must be above start {start:g} and at most the last checkpoint's step, {max(found):g}"
            )
        steps = steps[: next(i for i, step in enumerate(steps) if step >= t) + 1]
        self._wanted = [x if isinstance(x, Target) else Target.power(x) for x in targets]
        self._profiles = [w.at(t - start) for w in self._wanted]
        self._edges = np.array([0.0, *(min(step, t) - start for step in steps)])
        self._masses = np.stack([np.diff(p.cumulative(self._edges)) for p in self._profiles], axis=1)
        self._files = [found[step] for step in steps]
        self.adder = _Adder(self._files, self._masses, key, copied or _is_statistic)

    def result(self, j: int, tensors: dict[str, Tensor], clock: str, warn_above: float) -> Reconstruction:
        """A target's average, once all its tensors have been added up."""
        target, mass = self._wanted[j], self._masses[:, j]
        amplification = float(np.linalg.norm(mass))
        rounding = self.adder.rounding * amplification
        error = math.hypot(2 * self.adder.moved(self._profiles[j], self._edges, j), 1.1 * rounding)
        if error > warn_above:
            warnings.warn(
                f"{target.label} at t {self.t:g}: expect a relative error of {error:.1e}; what would help: checkpoints"
                " closer together, or tracking averages with PowerEMA",
                AccuracyWarning,
                stacklevel=3,
            )
        return Reconstruction(
            tensors=tensors,
            expected_error=error,
            rounding_error=rounding,
            profile_misfit=math.nan,
            amplification=amplification,
            label=target.label,
            sigma_rel=target.sigma_rel,
            t=self.t,
            coefficients={str(f): float(m) for f, m in zip(self._files, mass, strict=True) if m},
            run_id="",
            clock=clock,
            metadata=None,
        )

    def record(self, j: int) -> dict[str, Any]:
        """What a merge was made from, as its folder says."""
        masses = zip(self._files, self._masses[:, j].tolist(), strict=True)
        return {
            "target": self._wanted[j].label,
            "t": self.t,
            "checkpoints": {str(f.resolve()): m for f, m in masses if m},
        }

    def is_done(self, j: int, folder: Path) -> bool:
        """Whether a folder holds this merge."""
        if not folder.exists():
            return False
        try:
            found = read_json(folder / _RECORD)
            same = {name: found[name] for name in self.record(j)} == self.record(j)
            same &= type(found["expected_error"]) in (int, float)
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise FileExistsError(
                f"{folder} exists already and holds something else: choose another name or move it away"
            )
        return True


def _copy_beside(checkpoint: Path, folder: Path, written: set[str]) -> None:
    """Copy the files that describe a model: configuration, tokenizer, chat template."""
    source = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for path in sorted(source.iterdir()):
        described = (
            path.suffix.lower() in _BESIDE and path.name not in _TRAINER and not path.name.startswith(".")
        )
        if described and path.is_file() and path.name not in written:
            shutil.copyfile(path, folder / path.name)


class _Adder:
    """Adds checkpoints up tensor by tensor, and remembers some elements of each to judge how they moved."""

    def __init__(
        self, files: Sequence[Path], masses: FloatArray, key: str | None, is_copied: Callable[[str], bool]
    ) -> None:
        counts = np.abs(masses).max(axis=1) > _NEGLIGIBLE
        needed = np.flatnonzero(counts | np.append(counts[1:], False)).tolist()
        self._masses = masses
        self._opened = {i: open_checkpoint(files[i], key) for i in needed}
        self._samples: dict[int, dict[str, FloatArray]] = {i: {} for i in needed}
        self.last = self._opened[needed[-1]]
        self.averaged = _averaged(self.last, is_copied)
        for checkpoint in self._opened.values():
            _check_same(checkpoint, _averaged(checkpoint, is_copied), self.averaged)
        types = {spec.dtype for c in self._opened.values() for spec in _averaged(c, is_copied).values()}
        self.rounding = max(_ROUNDING.get(dtype, 0.0) for dtype in types)
        numel = sum(spec.numel for spec in self.averaged.values())
        self._stride = max(1, numel // _SAMPLE)

    @torch.no_grad()
    def sums(self, name: str, *, only: int | None = None) -> list[Tensor]:
        """One tensor's averages, in float32: one for each target, or for one of them."""
        masses = self._masses if only is None else self._masses[:, [only]]
        sums = [torch.zeros(self.averaged[name].shape) for _ in masses.T]
        for i, checkpoint in self._opened.items():
            x = checkpoint.read(name)
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"{checkpoint.path} holds values that are not finite in {name!r}: leave it out"
                )
            for total, mass in zip(sums, masses[i].tolist(), strict=True):
                if mass:
                    total.add_(x.float(), alpha=mass)
            # Evenly spaced elements, each scaled to stand for those between.
            taken = x.reshape(-1)[:: self._stride].double().numpy()
            self._samples[i][name] = taken * math.sqrt(x.numel() / max(taken.size, 1))
        return sums

    def copied(self) -> dict[str, Tensor]:
        """The last checkpoint's other tensors."""
        return {name: self.last.read(name) for name in self.last.stored if name not in self.averaged}

    def moved(self, profile: Profile, edges: FloatArray, j: int) -> float:
        """Relative L2 error from taking each checkpoint for the whole interval before it.

        Where weights went straight from one checkpoint to the next it is known, and added up with its sign;
        where they wandered between, the parts of all intervals are independent. The way to the first
        checkpoint is unknown: it may have been as long as the weights themselves.
        """
        straight, wandered = np.zeros(1), 0.0
        samples = {i: np.concatenate([parts[n] for n in self.averaged]) for i, parts in self._samples.items()}
        norm = float(np.linalg.norm(samples[max(samples)])) or 1.0
        for i in np.flatnonzero(np.abs(self._masses[:, j]) > _NEGLIGIBLE).tolist():
            inside = np.linspace(edges[i], edges[i + 1], 65)
            missed = profile.cumulative((inside[1:] + inside[:-1]) / 2) - profile.cumulative(inside[:1])
            way = samples[i] - samples.get(i - 1, np.zeros(1))
            straight = straight + missed.mean() * way
            wandered += float(missed.var()) * float(way @ way)
        return math.hypot(float(np.linalg.norm(straight)), math.sqrt(wandered)) / norm


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _averaged(checkpoint: Checkpoint, is_copied: Callable[[str], bool]) -> dict[str, TensorSpec]:
    found = {
        n: s for n, s in sorted(checkpoint.specs.items()) if s.dtype.is_floating_point and not is_copied(n)
    }
    if not found:
        raise ValueError(
            f"{checkpoint.path} holds nothing to average: no floating-point tensor that is not copied"
        )
    return found


def _check_same(
    checkpoint: Checkpoint, given: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> None:
    ours, theirs = ({n: s.shape for n, s in specs.items()} for specs in (given, expected))
    differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if differing:
        raise ValueError(
            f"{checkpoint.path} is of another model: {len(differing)} tensors are missing, new or of another"
            f" shape, first {differing[0]!r}; leave it out"
        )
