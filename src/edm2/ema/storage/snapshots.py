"""A folder of self-describing snapshots: safetensors files and a manifest, whole after any kill."""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.storage import tensorfile
from edm2.ema.storage.encoding import Track, write_track
from edm2.ema.storage.locking import folder_lock
from edm2.ema.storage.replacing import make_folder, reason, remedy, replacing
from edm2.ema.storage.thinning import times_to_keep

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "edm2.ema", 1
_TEMPORARY = re.compile(r"\.writing-.*\.tmp|\.manifest\.json(\.\d+)?\.tmp")
_DATA = re.compile(r"t[\d.e+-]+_s[\d.]+_[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What all snapshots of a folder have in common.

    Attributes:
        run_id: Name of the training run.
        clock: Unit of time.
        start: Time at which training started, in the clock's unit.
        aliases: Other names of tied tensors -> the name under which they are stored.
        metadata: The user's description of the run, JSON values; None if not given.
    """

    run_id: str
    clock: str
    start: float
    aliases: dict[str, str]
    metadata: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One stored average.

    Attributes:
        file: File name in the folder.
        t: Time, in the clock's unit.
        sigma_rel: Width of the profile.
        gamma: Its exponent.
        dtype: Stored type: fp32, bf16 or fp16.
        num_bytes: Size of the file.
        sha256: Of the whole file.
        header_sha256: Of the file's header.
        data_sum: Sum of the data's 64-bit words, checked whenever the data is read.
        norm: L2 norm of the averaged tensors.
        rounding: Relative L2 error that the stored type made.
        distance: Relative L2 distance to the weights at that time.
    """

    file: str
    t: float
    sigma_rel: float
    gamma: float
    dtype: str
    num_bytes: int
    sha256: str
    header_sha256: str
    data_sum: str
    norm: float
    rounding: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a folder, snapshots sorted by time and width."""

    run: RunInfo
    layout: str
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, kw_only=True)
class ForeignSnapshots:
    """Snapshots in files of another format, described as ours: taken wherever a folder of snapshots is read.

    Attributes:
        folder: Where the files are.
        manifest: What they hold; an empty `data_sum` is not checked, a `distance` of NaN is not known.
        files: File name -> where its tensors lie, as plain little-endian numbers in row-major order; the
            metadata need `copied` only.
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, tensorfile.TensorFile]

    def __str__(self) -> str:
        return str(self.folder)


def read_manifest(folder: str | Path | ForeignSnapshots) -> Manifest:
    """Read what a folder of snapshots holds.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.

    Returns:
        Its content.

    Raises:
        ValueError: If there is no manifest or it cannot be understood.
    """
    if isinstance(folder, ForeignSnapshots):
        return folder.manifest
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no folder of snapshots: it has no {MANIFEST}; give the folder that snapshot() was called"
            " with, or that of a run"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error
    if (
        not isinstance(content, dict)
        or content.get("format") != _FORMAT
        or content.get("version") != _VERSION
    ):
        raise ValueError(
            f"{path} is not a manifest of {_FORMAT} version {_VERSION}: read it with the edm2 that wrote it"
        )
    try:
        run = RunInfo(**{f.name: content[f.name] for f in fields(RunInfo)})
        entries = tuple(_checked(Snapshot(**entry)) for entry in content["snapshots"])
        if not isinstance(run.metadata, (dict, type(None))) or not isinstance(run.aliases, dict):
            raise TypeError("metadata or aliases, which are no table")
        return Manifest(run=run, layout=content["layout"], snapshots=entries)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged (entry {error}): restore it from a copy") from error


def _checked(snapshot: Snapshot) -> Snapshot:
    """The same; raises TypeError where a value is of another kind, or the file lies elsewhere."""
    for field in fields(Snapshot):
        value = getattr(snapshot, field.name)
        kinds = {str: (str,), int: (int,), float: (int, float)}[field.type]  # type: ignore[index]
        if type(value) not in kinds:
            raise TypeError(f"{field.name}, which is a {type(value).__name__}")
    if Path(snapshot.file).name != snapshot.file:
        raise TypeError("file, which is not in this folder")
    return snapshot


def write(
    folder: Path,
    run: RunInfo,
    *,
    t: float,
    layout: str,
    tracks: Iterable[Track],
    dtype: str,
    keep: int | None = None,
    own_until: float = -math.inf,
) -> list[Path]:
    """Add the averages of one time to a folder; see `PowerEMA.snapshot`.

    What lies there of this time or a later one is replaced only up to `own_until`; the rest must come out the
    same, or the write is refused.

    Every file is written aside, flushed and renamed, then the manifest is replaced in one step, so that a
    kill at any moment leaves a folder with all that its manifest names. Snapshots that are given up leave
    the manifest in the same step, and their files are deleted after it.
    """
    _check_json(run.metadata)
    try:
        make_folder(folder)
        with folder_lock(folder):
            return _write(
                folder, run, t=t, layout=layout, tracks=tracks, dtype=dtype, keep=keep, own_until=own_until
            )
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write a snapshot ({reason(error)}): the folder holds what it held before;"
            f" {remedy(error)} and call snapshot() again",
            str(folder),
        ) from error


def _write(
    folder: Path,
    run: RunInfo,
    *,
    t: float,
    layout: str,
    tracks: Iterable[Track],
    dtype: str,
    keep: int | None,
    own_until: float,
) -> list[Path]:
    known: tuple[Snapshot, ...] = ()
    if (folder / MANIFEST).exists():
        old = read_manifest(folder)
        run, known = _same_run(folder, old, run, layout), old.snapshots
    else:
        _start_folder(folder, run, layout)
    remove_strays(folder, run, known)
    try:
        new = [_write_one(folder, run, t=t, track=track, dtype=dtype) for track in tracks]
        content = [s for s in known if s.t < t] + new + _later(folder, run, known, new, own_until)
        if keep is not None:
            content = _thinned(content, run, new, keep)
        write_manifest(folder, Manifest(run=run, layout=layout, snapshots=tuple(content)))
    except Exception:
        remove_strays(folder, run, read_manifest(folder).snapshots)
        raise
    remove_strays(folder, run, content)
    return [folder / snapshot.file for snapshot in new]


def _thinned(content: list[Snapshot], run: RunInfo, new: list[Snapshot], keep: int) -> list[Snapshot]:
    widths = [s.sigma_rel for s in new]
    while len(content) > keep and len(times := sorted({s.t - run.start for s in content})) > 1:
        kept = times_to_keep(times, widths, len(times) - 1, dtype=new[0].dtype)
        content = [s for s in content if s.t - run.start in kept]
    return content


def _start_folder(folder: Path, run: RunInfo, layout: str) -> None:
    orphans = sorted(path.name for path in folder.iterdir() if _DATA.fullmatch(path.name))
    if orphans:
        raise ValueError(
            f"{folder} holds {len(orphans)} snapshot files ({orphans[0]}, ...) but no {MANIFEST}: restore the"
            " manifest, or choose an empty folder"
        )
    write_manifest(folder, Manifest(run=run, layout=layout, snapshots=()))


def _write_one(folder: Path, run: RunInfo, *, t: float, track: Track, dtype: str) -> Snapshot:
    gamma = sigma_rel_to_gamma(track.sigma_rel)
    header = {"run_id": run.run_id, "clock": run.clock, "t": repr(t), "gamma": repr(gamma)}

    def name(sums: tensorfile.FileSums) -> str:
        return f"t{_time_text(t)}_s{track.sigma_rel:.4f}_{sums.sha256[:8]}.safetensors"

    aside = folder / f"writing-{track.sigma_rel!r}"
    sums, facts = write_track(aside, track, dtype=dtype, metadata={"format": _FORMAT, **header}, name=name)
    return Snapshot(
        file=name(sums), t=t, sigma_rel=track.sigma_rel, gamma=gamma, dtype=dtype, **asdict(sums), **facts
    )  # fmt: skip


def _later(
    folder: Path, run: RunInfo, known: Sequence[Snapshot], new: Sequence[Snapshot], own_until: float
) -> list[Snapshot]:
    """Snapshots of later times that still belong to the run when it writes an earlier time again."""
    t = new[0].t
    later = [s for s in known if s.t > t]
    lost = [s for s in known if s.t >= t]
    if {s.sha256 for s in known if s.t == t} == {s.sha256 for s in new}:
        return later
    if lost and max(s.t for s in lost) > own_until:
        raise ValueError(
            f"{folder} holds {len(lost)} snapshots of run {run.run_id!r} from t {lost[0].t:g} to {lost[-1].t:g},"
            f" which this one of t {t:g}, from other weights, would delete: to go on with that run, load its"
            " state with load_state_dict; to begin anew, choose another folder"
        )
    if later:
        warnings.warn(
            f"{folder}: the run went back to t {t:g} and goes on differently, so {len(later)} snapshots after"
            " it are of a past that is no longer this run's; they are removed",
            stacklevel=4,
        )
    return []


def _same_run(folder: Path, old: Manifest, run: RunInfo, layout: str) -> RunInfo:
    if old.run.run_id != run.run_id:
        raise ValueError(
            f"{folder} holds snapshots of run {old.run.run_id!r}, this is run {run.run_id!r}: choose an empty"
            " folder, or load_state_dict to go on with that run; of several processes that train one model, let"
            " the first alone call snapshot"
        )
    for name in ("clock", "start", "aliases"):
        if getattr(old.run, name) != getattr(run, name):
            raise ValueError(
                f"{folder} was written with {name} {getattr(old.run, name)!r}, now it is"
                f" {getattr(run, name)!r}: go on with the same settings, or choose an empty folder"
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
        same = json.loads(json.dumps(metadata)) == metadata
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata cannot be written as JSON ({error}): use strings, numbers, lists, dicts"
        ) from error
    if not same:
        raise ValueError("metadata changes when written as JSON: use string keys and lists instead of tuples")


def layout_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of the names and shapes of a model's tensors."""
    return sha256(json.dumps({n: list(s) for n, s in shapes.items()}, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a folder's manifest in one step, after its files are safely on the disk."""
    entries = sorted(manifest.snapshots, key=lambda s: (s.t, s.sigma_rel))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        **asdict(manifest.run),
        "layout": manifest.layout,
        "snapshots": [asdict(s) for s in entries],
    }
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def remove_strays(folder: Path, run: RunInfo, known: Sequence[Snapshot]) -> None:
    """Delete what an interrupted write of this run left: temporary files, and data that no manifest names."""
    names = {s.file for s in known}
    for path in folder.iterdir():
        orphan = _DATA.fullmatch(path.name) and path.name not in names and _run_of(path) == run.run_id
        if orphan or _TEMPORARY.fullmatch(path.name):
            path.unlink()


def _run_of(path: Path) -> str | None:
    try:
        return tensorfile.read_header(path).metadata.get("run_id")
    except ValueError:
        return None


def open_snapshot(
    folder: str | Path | ForeignSnapshots, run: RunInfo, snapshot: Snapshot
) -> tensorfile.TensorFile:
    """Open a snapshot's file and make sure that it is the one that the manifest names.

    Raises:
        ValueError: If it is missing, cut short, or of another run, time or profile.
    """
    if isinstance(folder, ForeignSnapshots):
        return folder.files[snapshot.file]
    path = Path(folder) / snapshot.file
    if not path.exists():
        raise ValueError(f"{path} is named by the manifest but missing: restore it from a copy")
    if path.stat().st_size != snapshot.num_bytes:
        raise ValueError(
            f"{path} is damaged: it has {path.stat().st_size} bytes, the manifest says {snapshot.num_bytes};"
            " restore it from a copy"
        )
    header = tensorfile.read_header(path)
    run_id = header.metadata.get("run_id")
    if run_id != run.run_id:
        raise ValueError(f"{path} belongs to run {run_id!r}, the folder to {run.run_id!r}: take it out")
    if header.header_sha256 != snapshot.header_sha256:
        raise ValueError(f"{path} is damaged: its header is not the one written; restore it from a copy")
    return header


def _time_text(t: float) -> str:
    return f"{int(t):012d}" if t == int(t) else repr(t)
