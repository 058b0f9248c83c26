"""Averages of any length from a folder of snapshots."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edm2.ema.maths.solve import HOPELESS_MISFIT, Solution
from edm2.ema.maths.targets import Target
from edm2.ema.storage.manifest import ForeignSnapshots, Manifest, Snapshot, read_manifest
from edm2.ema.storage.replacing import folder_lock
from edm2.ema.stored_averages import StoredAverages

_TRIES = 5
_SHARE_OF_MEMORY = 0.5
_UNKNOWN_MEMORY = 4 << 30
_CONTROL_GROUP = Path("/sys/fs/cgroup")


class AccuracyWarning(UserWarning):
    """A reconstruction is expected to be less accurate than requested."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An average made from snapshots.

    Attributes:
        tensors: Name -> tensor. Averaged ones are float32, copied ones (buffers) unchanged; tied tensors appear under
            each of their names. Loads with `model.load_state_dict(result.tensors)`.
        expected_error: Expected relative L2 error of the averaged tensors, on the safe side.
        rounding_error: The part of it that comes from the stored type.
        profile_misfit: Relative L2 distance between the profile that was made and the wanted one.
        amplification: Factor by which the combination amplifies the rounding of the stored averages.
        label: Description of the target.
        sigma_rel: Its EMA length, if it is a power function.
        t: Time, in the run's clock.
        coefficients: Weight of each snapshot file.
        run_id: Run that the snapshots belong to.
        clock: Unit of t.
        metadata: What was passed to `snapshot(metadata=...)`.
        write_backs: When `PowerEMA.write_to` set the model to an average: dicts of t, sigma_rel, keep. Averages of
            times around such a jump hold weights of both sides.
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
    write_backs: tuple[dict[str, Any], ...] = ()


def reconstruct(
    folder: str | Path | ForeignSnapshots,
    sigma_rel: float | None = None,
    t: float | None = None,
    *,
    target: Target | None = None,
    tracks: Sequence[float] | None = None,
    warn_above: float = 0.01,
) -> Reconstruction:
    """Make an average of any length from a folder of snapshots.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote, or a `ForeignSnapshots`.
        sigma_rel: EMA length, as a fraction of training time, in (0, 0.2887].
        t: Time at which the average is wanted. Default: the last snapshot's.
        target: Any other profile, instead of `sigma_rel`.
        tracks: Use only the snapshots with these EMA lengths. Default: all.
        warn_above: Warn if the expected relative error is larger.

    Returns:
        The average and its expected error.

    Raises:
        ValueError: If the snapshots cannot give that average, or a file is missing or damaged.

    Ref: EDM2 Sec. 3.2.
    """
    if (sigma_rel is None) == (target is None):
        raise ValueError("give either sigma_rel or target: which average do you want?")
    wanted = Target.power(sigma_rel) if sigma_rel is not None else target
    assert wanted is not None
    return reconstruct_many(folder, [wanted], t, tracks=tracks, warn_above=warn_above)[0]


def reconstruct_many(
    folder: str | Path | ForeignSnapshots,
    targets: Sequence[float | Target],
    t: float | None = None,
    *,
    tracks: Sequence[float] | None = None,
    warn_above: float = 0.01,
    read: bool = True,
) -> list[Reconstruction]:
    """Make several averages in one pass over the files; see `reconstruct`.

    All of them are in memory at once, in float32. For more than that, see `reconstruct_each`.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote. A run may be writing to it meanwhile.
        targets: EMA lengths or other profiles.
        t: Time at which they are wanted. Default: the last snapshot's.
        tracks: Use only the snapshots with these EMA lengths. Default: all.
        warn_above: Warn if the expected relative error is larger.
        read: False leaves `tensors` empty: coefficients and expected errors come without reading the files.

    Returns:
        One average for each target.
    """
    return _chosen(folder, targets, range(len(targets)) if read else (), t, tracks, warn_above)


def reconstruct_each(
    folder: str | Path | ForeignSnapshots,
    targets: Sequence[float | Target],
    t: float | None = None,
    *,
    tracks: Sequence[float] | None = None,
    warn_above: float = 0.01,
    memory_bytes: float | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[Reconstruction]:
    """Make any number of averages in bounded memory: as many as fit in each pass over the files.

    The averages do not depend on how many fit, nor on which are asked for.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        targets: EMA lengths or other profiles.
        t: Time at which they are wanted. Default: the last snapshot's.
        tracks: Use only the snapshots with these EMA lengths. Default: all.
        warn_above: Warn if the expected relative error is larger.
        memory_bytes: Memory for the averages of a pass. Default: half of what is free.
        only: Which of the targets, by their positions. Default: all.

    Yields:
        One average for each of these targets, in order. Drop each before asking for the next.
    """
    left = [*range(len(targets))] if only is None else [*only]
    if not left:
        return
    manifest = read_manifest(folder)
    t = _target_time(folder, manifest, t)
    room = _SHARE_OF_MEMORY * free_memory() if memory_bytes is None else memory_bytes
    size = max((4 if s.dtype == "fp32" else 2, s.num_bytes) for s in manifest.snapshots)
    at_once = max(1, int(room // max(1, size[1] * 4 // size[0])))
    while left:
        group, left = left[:at_once], left[at_once:]
        made = _chosen(folder, targets, group, t, tracks, warn_above)
        for i in group:
            yield made[i]
            made[i] = made[group[-1]]  # lets go of it


def _chosen(
    folder: str | Path | ForeignSnapshots,
    targets: Sequence[float | Target],
    chosen: Sequence[int],
    t: float | None,
    tracks: Sequence[float] | None,
    warn_above: float,
) -> list[Reconstruction]:
    """All targets; tensors for the chosen ones only. Solving for all together keeps their bits the same.

    It tries again with the new manifest when a writer that keeps only some snapshots deletes files meanwhile.
    """
    wanted = [x if isinstance(x, Target) else Target.power(x) for x in targets]
    manifest = read_manifest(folder)
    for _ in range(_TRIES):
        try:
            return _reconstruct(folder, manifest, wanted, chosen, t, tracks, warn_above)
        except FileNotFoundError as error:
            before, manifest = manifest, read_manifest(folder)
            if manifest == before:
                raise ValueError(
                    f"{error.filename} is named by the manifest but missing: restore it from a copy"
                ) from None
    with folder_lock(Path(str(folder))):  # the writer waits
        return _reconstruct(folder, read_manifest(folder), wanted, chosen, t, tracks, warn_above)


def _reconstruct(
    folder: str | Path | ForeignSnapshots,
    manifest: Manifest,
    wanted: Sequence[Target],
    chosen: Sequence[int],
    t: float | None,
    tracks: Sequence[float] | None,
    warn_above: float,
) -> list[Reconstruction]:
    manifest = _with_tracks(folder, manifest, tracks)
    t = _target_time(folder, manifest, t)
    used = _useful(manifest, t)
    stored = StoredAverages(folder, manifest, used)
    profiles = [w.at(t - manifest.run.start) for w in wanted]
    solutions = stored.solve(profiles)
    for target, profile, solution in zip(wanted, profiles, solutions, strict=True):
        misfit = solution.profile_misfit
        if (
            misfit > HOPELESS_MISFIT
        ):  # perhaps by choice: coarse snapshots of weights at rest are best averaged
            misfit = stored.least_misfit(profile)
        _refuse_hopeless(target, misfit, t, used)
    sums: list[dict[str, Tensor]] = [{} for _ in solutions]
    copied: dict[str, Tensor] = {}
    if len(chosen):
        added, copied = stored.add_up(np.stack([solutions[i].coefficients for i in chosen], axis=1), t)
        for i, averaged in zip(chosen, added, strict=True):
            sums[i] = averaged
    results = []
    for target, profile, solution, averaged in zip(wanted, profiles, solutions, sums, strict=True):
        tensors = {**averaged, **copied} if averaged else {}
        tensors |= {alias: tensors[name] for alias, name in manifest.run.aliases.items() if tensors}
        error = stored.expected_error(solution, profile)
        if error > warn_above:
            warnings.warn(_advice(target, solution, error, used, t), AccuracyWarning, stacklevel=4)
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
                write_backs=stored.write_backs,
            )
        )
    return results


def _with_tracks(
    folder: str | Path | ForeignSnapshots, manifest: Manifest, tracks: Sequence[float] | None
) -> Manifest:
    if tracks is None:
        return manifest
    stored = sorted({s.sigma_rel for s in manifest.snapshots})
    unknown = [x for x in tracks if not any(math.isclose(x, s, rel_tol=1e-6) for s in stored)]
    if unknown or not tracks:
        raise ValueError(
            f"track {', '.join(f'{x:g}' for x in unknown) or '(none)'} is not stored in {folder}: choose among"
            f" {', '.join(f'{s:g}' for s in stored)}"
        )
    chosen = (
        s for s in manifest.snapshots if any(math.isclose(x, s.sigma_rel, rel_tol=1e-6) for x in tracks)
    )
    return Manifest(run=manifest.run, layout=manifest.layout, snapshots=tuple(chosen))


def _target_time(folder: str | Path | ForeignSnapshots, manifest: Manifest, t: float | None) -> float:
    if not manifest.snapshots:
        raise ValueError(f"{folder} holds no snapshots yet: continue training until the first one is written")
    times = [s.t for s in manifest.snapshots]
    t = max(times) if t is None else t
    if t > max(times):
        raise ValueError(
            f"t {t:g} is beyond the last snapshot of {folder}, at {max(times):g}: choose a time up to that"
        )
    if not t >= min(times):
        raise ValueError(
            f"t {t:g} is before the first snapshot of {folder}, at {min(times):g}: choose a time from that on"
        )
    return t


def _useful(manifest: Manifest, t: float) -> list[Snapshot]:
    """Snapshots up to a time, and those of the next time, which also hold the weights just before it."""
    later = [s.t for s in manifest.snapshots if s.t > t]
    exact = any(s.t == t for s in manifest.snapshots)
    until = t if exact or not later else min(later)
    return [s for s in manifest.snapshots if s.t <= until]


def _refuse_hopeless(target: Target, misfit: float, t: float, used: Sequence[Snapshot]) -> None:
    widths = sorted({s.sigma_rel for s in used})
    if len(used) == 1 and misfit > 1e-6:
        raise ValueError(
            f"a single snapshot, of sigma_rel {widths[0]:g}, cannot give {target.label}: it takes another track or an"
            " earlier snapshot"
        )
    if misfit > HOPELESS_MISFIT:
        near = f"near {target.sigma_rel:g}" if target.sigma_rel is not None else "like it"
        raise ValueError(
            f"{target.label} at t {t:g} cannot be expressed by these {len(used)} snapshots of widths"
            f" {', '.join(f'{w:g}' for w in widths)} (misfit {misfit:.0%}): choose a target nearer to them;"
            f" this one needs another track {near}, or closer snapshots (`edm2.ema.plan` says which)"
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


def free_memory() -> int:
    """Free memory in bytes, within the limits of a container; 4 GB where the system does not say."""
    known = [room for room in (_of_the_machine(), _of_the_container()) if room is not None]
    return min(known, default=_UNKNOWN_MEMORY)


def _of_the_machine() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):  # no Linux
        return None


def _of_the_container() -> int | None:
    try:
        limit, used = ((_CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
