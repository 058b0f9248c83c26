"""Averages of any length from a folder of snapshots."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edm2.ema.profiles import FloatArray, power_inner, sigma_rel_to_gamma
from edm2.ema.snapshots import Manifest, Snapshot, open_snapshot, read_manifest
from edm2.ema.solve import solve_coefficients
from edm2.ema.stream import WeightedSums, read_tensors
from edm2.ema.tensorfile import TensorFile


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An average that was put together from snapshots.

    Attributes:
        tensors: Name -> tensor: averaged ones float32, copied ones (buffers) as they were; tied tensors
            appear under each of their names. Loads with `model.load_state_dict(result.tensors)`.
        expected_error: Relative L2 error of the averaged tensors to expect.
        sigma_rel: Width of the profile.
        t: Time, in the run's clock.
        coefficients: Weight of each snapshot file.
        run_id: Run that the snapshots are of.
        clock: Unit of t.
        metadata: What was passed to `snapshot(metadata=...)`.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    expected_error: float
    sigma_rel: float
    t: float
    coefficients: dict[str, float] = field(repr=False)
    run_id: str
    clock: str
    metadata: dict[str, Any] | None


def reconstruct(folder: str | Path, sigma_rel: float, t: float | None = None) -> Reconstruction:
    """Put an average of any length together from a folder of snapshots.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        sigma_rel: Wanted width as a fraction of training time, in (0, 0.2887].
        t: Time at which the average is wanted. Default: the last snapshot's.

    Returns:
        The average, with the error to expect.

    Raises:
        ValueError: If the snapshots cannot give that average, or a file is missing or damaged.

    Ref: EDM2 Sec. 3.2.
    """
    return reconstruct_many(folder, [sigma_rel], t)[0]


def reconstruct_many(
    folder: str | Path, sigma_rels: Sequence[float], t: float | None = None
) -> list[Reconstruction]:
    """Put several averages together in one pass over the files; see `reconstruct`."""
    manifest = read_manifest(folder)
    t = _target_time(folder, manifest, t)
    used = [s for s in manifest.snapshots if s.t <= t]
    start = manifest.run.start
    coefficients = solve_coefficients(
        [s.t - start for s in used], [s.sigma_rel for s in used], t - start, sigma_rels
    )
    files = [open_snapshot(folder, manifest.run, s) for s in used]
    sums, copied = _add_up(files, used, coefficients)
    results = []
    for column, (sigma_rel, averaged) in enumerate(zip(sigma_rels, sums, strict=True)):
        tensors = {**averaged, **copied}
        tensors |= {alias: tensors[name] for alias, name in manifest.run.aliases.items()}
        weights = coefficients[:, column]
        results.append(
            Reconstruction(
                tensors=tensors,
                expected_error=_expected_error(used, weights, start, t, sigma_rel),
                sigma_rel=sigma_rel,
                t=t,
                coefficients={s.file: float(w) for s, w in zip(used, weights, strict=True)},
                run_id=manifest.run.run_id,
                clock=manifest.run.clock,
                metadata=manifest.run.metadata,
            )
        )
    return results


def _target_time(folder: str | Path, manifest: Manifest, t: float | None) -> float:
    if not manifest.snapshots:
        raise ValueError(f"{folder} holds no snapshot yet: train on until the first one is written")
    last = max(s.t for s in manifest.snapshots)
    t = last if t is None else t
    if t > last:
        raise ValueError(
            f"t {t:g} is beyond the last snapshot of {folder}, at {last:g}: ask for a time up to that"
        )
    return t


def _add_up(
    files: Sequence[TensorFile], used: Sequence[Snapshot], coefficients: FloatArray
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    scales = [json.loads(f.metadata.get("scales", "{}")) for f in files]
    copied_names: list[str] = json.loads(files[-1].metadata["copied"])
    names = [name for name in files[-1].specs if name not in copied_names]
    adder = WeightedSums(files, coefficients, scales=scales)
    sums = adder.run(names)
    copied: dict[str, Tensor] = {}
    for file, snapshot, data_sum in zip(files, used, adder.data_sums, strict=True):
        total = int(data_sum, 16)
        for name, tensor, words in read_tensors(file, copied_names):
            copied[name] = tensor
            total += words
        if f"{total % (1 << 64):016x}" != snapshot.data_sum:
            raise ValueError(
                f"{file.path} is damaged: its data is not what was written; restore it from a copy"
            )
    return sums, copied


def _expected_error(
    used: Sequence[Snapshot], weights: FloatArray, start: float, t: float, sigma_rel: float
) -> float:
    times = np.array([s.t - start for s in used])
    gammas = np.array([s.gamma for s in used])
    gamma = sigma_rel_to_gamma(sigma_rel)
    ab = power_inner(times, gammas, t - start, gamma)
    aa = power_inner(times[:, None], gammas[:, None], times, gammas)
    bb = float(power_inner(t - start, gamma, t - start, gamma))
    misfit = np.sqrt(max(float(weights @ aa @ weights - 2 * weights @ ab) + bb, 0.0) / bb)
    distance = max(s.distance for s in used)
    rounding = np.sqrt(sum((w * s.rounding) ** 2 for w, s in zip(weights, used, strict=True)))
    return float(np.hypot(misfit * distance, rounding))
