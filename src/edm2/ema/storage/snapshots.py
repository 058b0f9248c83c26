"""Writing and opening the snapshots of a folder: safetensors files and a manifest, whole after any kill."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edm2.ema.maths.plans import times_to_keep
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.storage.encoding import Track, write_track
from edm2.ema.storage.manifest import (
    FORMAT,
    MANIFEST,
    ForeignSnapshots,
    Manifest,
    RunInfo,
    Snapshot,
    read_manifest,
    write_manifest,
)
from edm2.ema.storage.replacing import folder_lock, make_folder, reason, remedy, sha256_of
from edm2.ema.storage.tensorfile import FileSums, TensorFile, read_header

_TEMPORARY = re.compile(r"\.writing-.*\.tmp|\.manifest\.json(\.\d+)?\.tmp")
_DATA = re.compile(r"t[\d.e+-]+_s[\d.]+_[0-9a-f]{8}\.safetensors")


def write(
    folder: Path,
    run: RunInfo,
    *,
    t: float,
    layout: str,
    make: Callable[[], Iterable[Snapshot]],
    keep: int | None = None,
    own_until: float = -math.inf,
) -> list[Path]:
    """Add the averages of one time to a folder; see `PowerEMA.snapshot`.

    Snapshots of this time or later are replaced only up to `own_until`. Others must come out the same, or the write is
    refused.

    Every file is written aside, flushed and renamed, then the manifest is replaced in one step: a kill at any moment
    leaves a folder with all files that its manifest names. Thinned snapshots leave the manifest in the same step, and
    their files are deleted after it.

    Args:
        folder: The folder; made if missing.
        run: What all of its snapshots have in common.
        t: Time, in the clock's unit.
        layout: Digest of the tensors' names and shapes.
        make: Writes the averages with `write_one`, once the folder is held and fit for them.
        keep: Maximum number of snapshots in the folder.
        own_until: See above.

    Returns:
        The files of this time. None if `keep` thinned this time out of the folder before the run was restarted.
    """
    _check_json(run.metadata)
    with _writing_to(folder):
        known: tuple[Snapshot, ...] = ()
        if (folder / MANIFEST).exists():
            old = read_manifest(folder)
            run, known = _same_run(folder, old, run, layout), old.snapshots
            _warn_of_missing(folder, known)
        else:
            _start_folder(folder, run, layout, own_until)
        remove_strays(folder, run, known)
        try:
            new = list(make())
            later = _later(folder, run, known, new, keep=keep, own_until=own_until)
            if later is None:
                new, content = [], list(known)
            else:
                content = [s for s in known if s.t < t] + new + later
            if keep is not None and new:
                content = _thinned(content, run, new, keep)
            write_manifest(folder, Manifest(run=run, layout=layout, snapshots=tuple(content)))
        except Exception:
            remove_strays(folder, run, read_manifest(folder).snapshots)
            raise
        remove_strays(folder, run, content)
        return [folder / snapshot.file for snapshot in new]


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Hold a folder, made if missing."""
    with _explained(folder):
        make_folder(folder)
        with folder_lock(folder):
            yield


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Let errors of writing say what the folder holds."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write a snapshot ({reason(error)}): the folder holds what it held before;"
            f" {remedy(error)} and call snapshot() again",
            str(folder),
        ) from error


def _thinned(content: list[Snapshot], run: RunInfo, new: list[Snapshot], keep: int) -> list[Snapshot]:
    widths = [s.sigma_rel for s in new]
    while len(content) > keep and len(times := sorted({s.t - run.start for s in content})) > 1:
        kept = times_to_keep(times, widths, len(times) - 1, dtype=new[0].dtype)
        content = [s for s in content if s.t - run.start in kept]
    return content


def _start_folder(folder: Path, run: RunInfo, layout: str, own_until: float) -> None:
    orphans = sorted(path.name for path in folder.iterdir() if _DATA.fullmatch(path.name))
    if orphans:
        raise ValueError(
            f"{folder} holds {len(orphans)} snapshot files ({orphans[0]}, ...) but no {MANIFEST}: restore the"
            " manifest, or choose an empty folder"
        )
    if math.isfinite(own_until):
        warnings.warn(
            f"{folder} is empty now, but this run wrote snapshots there up to t {own_until:g}: something deleted"
            " or moved them, and averages of the time before now cannot be reconstructed without them",
            stacklevel=4,
        )
    write_manifest(folder, Manifest(run=run, layout=layout, snapshots=()))


def _warn_of_missing(folder: Path, known: Sequence[Snapshot]) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    lost = [s.file for s in known if sizes.get(s.file) != s.num_bytes]
    if lost:
        warnings.warn(
            f"{folder}: {len(lost)} of {len(known)} snapshot files are missing or cut short ({lost[0]}, ...): restore"
            " them from a copy, or reconstruction will refuse this folder",
            stacklevel=4,
        )


def write_one(folder: Path, run: RunInfo, track: Track, *, t: float, dtype: str) -> Snapshot:
    """Write the file of one average; it counts once the manifest names it."""
    gamma = sigma_rel_to_gamma(track.sigma_rel)
    t = float(t) if isinstance(t, float) else int(t)  # numpy's numbers have another repr
    header = {"run_id": run.run_id, "clock": run.clock, "t": repr(t), "gamma": repr(gamma)}
    time = f"{int(t):012d}" if t == int(t) else repr(t)

    def name(sums: FileSums) -> str:
        return f"t{time}_s{track.sigma_rel:.4f}_{sums.sha256[:8]}.safetensors"

    aside = folder / f"writing-{track.sigma_rel!r}"
    with _explained(folder):
        sums, facts = write_track(aside, track, dtype=dtype, metadata={"format": FORMAT, **header}, name=name)
    return Snapshot(
        file=name(sums), t=t, sigma_rel=track.sigma_rel, gamma=gamma, dtype=dtype, **asdict(sums), **facts
    )  # fmt: skip


def _later(
    folder: Path,
    run: RunInfo,
    known: Sequence[Snapshot],
    new: Sequence[Snapshot],
    *,
    keep: int | None,
    own_until: float,
) -> list[Snapshot] | None:
    """Later snapshots that still belong to the run when it writes an earlier time again; None to leave all as it is."""
    t = new[0].t
    later, lost = [s for s in known if s.t > t], [s for s in known if s.t >= t]
    if {s.sha256 for s in known if s.t == t} == {s.sha256 for s in new}:
        return later
    if lost and max(s.t for s in lost) > own_until:
        if keep is not None and len(lost) == len(later):
            return None  # thinned out before the restart; the next time that was kept tells whether the run is the same
        raise ValueError(
            f"{folder} holds {len(lost)} snapshots of run {run.run_id!r} from t {lost[0].t:g} to {lost[-1].t:g},"
            f" which this one of t {t:g}, from other weights or at another time, would delete: to continue that run,"
            " load its state with load_state_dict; to start over, choose another folder"
        )
    if later:
        warnings.warn(
            f"{folder}: the run went back to t {t:g} and now takes another course; the {len(later)} snapshots after"
            " that time belong to the old course and are removed",
            stacklevel=4,
        )
    return []


def _same_run(folder: Path, old: Manifest, run: RunInfo, layout: str) -> RunInfo:
    if old.run.run_id != run.run_id:
        raise ValueError(
            f"{folder} holds snapshots of run {old.run.run_id!r}, this is run {run.run_id!r}: choose an empty"
            " folder, or call load_state_dict to continue that run; if several processes train one model, call"
            " snapshot in the first one only"
        )
    for name in ("clock", "start", "aliases"):
        if getattr(old.run, name) != getattr(run, name):
            raise ValueError(
                f"{folder} was written with {name} {getattr(old.run, name)!r}, now it is"
                f" {getattr(run, name)!r}: continue with the same settings, or choose an empty folder"
            )
    if old.layout != layout:
        raise ValueError(
            f"{folder} holds snapshots of a model with other tensors (names or shapes changed): choose an"
            " empty folder"
        )
    if run.metadata is None or run.metadata == old.run.metadata:
        return old.run
    if old.run.metadata is None:
        return run
    differing = [
        k for k in {**old.run.metadata, **run.metadata} if old.run.metadata.get(k) != run.metadata.get(k)
    ]
    raise ValueError(
        f"{folder} was written with other metadata (differs in {differing}): metadata describes the"
        " whole run, so pass the same at every snapshot"
    )


def _check_json(metadata: dict[str, Any] | None) -> None:
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata cannot be written as JSON ({error}): use strings, finite numbers, lists, dicts"
        ) from error
    if not same:
        raise ValueError("metadata changes when written as JSON: use string keys and lists instead of tuples")


def remove_strays(folder: Path, run: RunInfo, known: Sequence[Snapshot]) -> None:
    """Delete leftovers of an interrupted write of this run: temporary files, and data that no manifest names."""
    names = {s.file for s in known}
    for path in folder.iterdir():
        orphan = _DATA.fullmatch(path.name) and path.name not in names and _run_of(path) == run.run_id
        if orphan or _TEMPORARY.fullmatch(path.name):
            path.unlink()


def _run_of(path: Path) -> str | None:
    try:
        return read_header(path).metadata.get("run_id")
    except ValueError:
        return None


def open_snapshot(folder: str | Path | ForeignSnapshots, run: RunInfo, snapshot: Snapshot) -> TensorFile:
    """Open a snapshot's file and make sure that it is the one that the manifest names.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is cut short, or of another run, time or profile.
    """
    if isinstance(folder, ForeignSnapshots):
        return folder.files[snapshot.file]
    path = Path(folder) / snapshot.file
    num_bytes = path.stat().st_size
    if num_bytes != snapshot.num_bytes:
        raise ValueError(
            f"{path} is damaged: it has {num_bytes} bytes, the manifest says {snapshot.num_bytes}; restore it"
            " from a copy"
        )
    header = read_header(path)
    run_id = header.metadata.get("run_id")
    if run_id != run.run_id:
        raise ValueError(f"{path} belongs to run {run_id!r}, the folder to {run.run_id!r}: take it out")
    if header.header_sha256 != snapshot.header_sha256:
        raise ValueError(f"{path} is damaged: its header is not the one written; restore it from a copy")
    for name in ("t", "gamma"):
        if header.metadata.get(name) != repr(getattr(snapshot, name)):
            raise ValueError(
                f"{path} was written with {name} {header.metadata.get(name)}, but {MANIFEST} says"
                f" {getattr(snapshot, name)!r}: restore the manifest from a copy"
            )
    return header


def damaged(folder: Path, manifest: Manifest, *, read: bool = True) -> Iterator[str]:
    """Compare every file with the manifest.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        manifest: Its content.
        read: Whether to read all data and compare its sha256. False compares sizes and headers, in milliseconds.

    Yields:
        One message for each damaged file, naming it.
    """
    for snapshot in manifest.snapshots:
        if problem := _problem(folder, manifest, snapshot, read=read):
            yield problem


def _problem(folder: Path, manifest: Manifest, snapshot: Snapshot, *, read: bool) -> str | None:
    try:
        path = open_snapshot(folder, manifest.run, snapshot).path
        if read and sha256_of(path) != snapshot.sha256:
            return f"{path} is damaged: its sha256 is not the one written; restore it from a copy"
    except FileNotFoundError as error:
        return f"{error.filename} is named by the manifest but missing: restore it from a copy"
    except (ValueError, OSError) as error:
        return str(error)
    return None
