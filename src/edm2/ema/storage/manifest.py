"""The manifest of a snapshot folder: what each file holds, sealed with a checksum."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from edm2.ema.maths.profiles import MAX_SIGMA_REL, gamma_to_sigma_rel
from edm2.ema.maths.targets import Profile
from edm2.ema.storage.encoding import LARGEST_DISTANCE, STORED
from edm2.ema.storage.guarded_json import Range, from_json, read_json
from edm2.ema.storage.replacing import replacing
from edm2.ema.storage.tensorfile import TensorFile

MANIFEST = "manifest.json"
FORMAT = "edm2.ema"
_VERSION = 1

LARGEST_NORM = 1e60  # far above what float32 can hold, and its powers still fit into float64
Time = Annotated[float, Range(low=-1e18, high=1e18)]
Width = Annotated[float, Range(low=1e-9, high=MAX_SIGMA_REL + 1e-9)]


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
    start: Time
    aliases: dict[str, str]
    metadata: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One stored average.

    Attributes:
        file: File name in the folder.
        t: Time, in the clock's unit.
        sigma_rel: EMA length of the profile.
        gamma: Its exponent.
        dtype: Stored type: fp32, bf16 or fp16.
        num_bytes: Size of the file.
        sha256: Hash of the whole file.
        header_sha256: Hash of the file's header.
        data_sum: Checksum of the tensors' data (`DataSum`), verified whenever the data is read.
        norm: L2 norm of the averaged tensors.
        rounding: Relative L2 error of the stored type's rounding, at most 1.
        distance: Relative L2 distance to the weights at that time, at most `LARGEST_DISTANCE`; NaN if unknown.
    """

    file: str
    t: Time
    sigma_rel: Width
    gamma: Annotated[float, Range(low=0, high=1e10)]
    dtype: str
    num_bytes: Annotated[int, Range(low=0, high=1 << 62)]
    sha256: str
    header_sha256: str
    data_sum: str
    norm: Annotated[float, Range(low=0, high=LARGEST_NORM)]
    rounding: Annotated[float, Range(low=0, high=1)]
    distance: Annotated[float, Range(low=0, high=LARGEST_DISTANCE, special=True)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a folder, snapshots sorted by time and width."""

    run: RunInfo
    layout: str
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, kw_only=True)
class ForeignSnapshots:
    """Snapshots in files of another format. Every function that reads a snapshot folder accepts them in its place.

    Attributes:
        folder: Where the files are.
        manifest: What they hold. An empty `data_sum` is not verified; a `distance` of NaN is unknown.
        files: File name -> where its tensors lie, as plain little-endian numbers in row-major order. The metadata need
            `copied` only.
        profiles: File name -> profile of its average, where it is not the power function of its `gamma`.
        interval: Time between the updates of the averages: the weights between them are in no file.
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, TensorFile]
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    interval: float = 0.0

    def __str__(self) -> str:
        return str(self.folder)


def read_manifest(folder: str | Path | ForeignSnapshots) -> Manifest:
    """Read what a snapshot folder holds.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.

    Returns:
        Its content.

    Raises:
        ValueError: If the manifest is missing or damaged.
    """
    if isinstance(folder, ForeignSnapshots):
        return folder.manifest
    path = Path(folder) / MANIFEST
    try:
        content = read_json(path, finite=False)  # earlier versions wrote an unknown distance as NaN
    except FileNotFoundError:
        if not Path(folder).exists():
            raise ValueError(f"{folder} does not exist: give a snapshot folder, or that of a run") from None
        raise ValueError(
            f"{folder} is not a snapshot folder: {MANIFEST} is missing; give the folder that snapshot() was called"
            " with, or that of a run"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != _VERSION:
        raise ValueError(
            f"{path} is not a manifest of {FORMAT} version {_VERSION}: read it with the edm2 that wrote it"
        )
    checksum = content.pop("checksum", None)
    if checksum is None:
        warnings.warn(
            f"{path} has no checksum because an earlier edm2 wrote it: changes to it can go unnoticed",
            stacklevel=2,
        )
    elif checksum != _checksum(content):
        raise ValueError(f"{path} is damaged (its checksum does not match): restore it from a copy")
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged (entry {error}): restore it from a copy") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a folder's manifest in one step."""
    entries = sorted(manifest.snapshots, key=lambda s: (s.t, s.sigma_rel))
    content = {
        "format": FORMAT,
        "version": _VERSION,
        **asdict(manifest.run),
        "layout": manifest.layout,
        "snapshots": [asdict(s) | ({"distance": None} if math.isnan(s.distance) else {}) for s in entries],
    }
    content["checksum"] = _checksum(content)
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def layout_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of the names and shapes of a model's tensors."""
    return sha256(json.dumps({n: list(s) for n, s in shapes.items()}, sort_keys=True).encode()).hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    """sha256 of the values, however the file lays them out."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest(content: dict[str, Any]) -> Manifest:
    """The content as dataclasses; raises TypeError or KeyError for values that cannot be ours."""
    run = from_json(RunInfo, {f.name: content[f.name] for f in fields(RunInfo)})
    json.dumps(run.metadata, allow_nan=False)
    snapshots = tuple(
        from_json(Snapshot, entry | ({"distance": math.nan} if entry["distance"] is None else {}))
        for entry in content["snapshots"]
    )
    for snapshot in snapshots:
        if snapshot.dtype not in STORED:
            raise TypeError(f"dtype, which is {snapshot.dtype!r:.20}")
        if Path(snapshot.file).name != snapshot.file or not 0 < len(snapshot.file) < 256:
            raise TypeError("file, which is not in this folder")
        if not snapshot.t > run.start:
            raise TypeError(f"t, which is {snapshot.t} and not after start {run.start}")
        if abs(gamma_to_sigma_rel(snapshot.gamma) - snapshot.sigma_rel) > 1e-6:
            raise TypeError(
                f"gamma, which is {snapshot.gamma} and does not fit sigma_rel {snapshot.sigma_rel}"
            )
    return Manifest(run=run, layout=content["layout"], snapshots=snapshots)
