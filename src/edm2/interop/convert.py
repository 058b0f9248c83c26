"""From official files to safetensors, with their licence next to them."""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from edm2.diffusion import save_model
from edm2.ema.storage.encoding import Track, largest_value
from edm2.ema.storage.manifest import ForeignSnapshots, RunInfo, Snapshot, read_manifest, write_manifest
from edm2.ema.storage.snapshots import write, write_one
from edm2.ema.storage.weighted_sums import read_tensors
from edm2.files import claimed, sha256_of, sync_folder, write_atomic
from edm2.interop.fetch import check_there, fetch
from edm2.interop.licence import LICENCE, NOTICE_LINE, write_notice
from edm2.interop.model_info import model_info
from edm2.interop.network_file import NetworkFile, network_of
from edm2.interop.pickle_file import read_pickle, refusal
from edm2.interop.reference import (
    REFERENCE_FORMAT,
    ReferenceStatistics,
    read_reference_statistics,
    statistics_of,
)
from edm2.interop.released import SamplingPreset
from edm2.interop.snapshot_folder import SnapshotName, open_snapshots, parse_name
from edm2.metrics.tensor_file import read_header, to_metadata

_DOWNLOADS = ".downloads"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One file or folder that an import made.

    Attributes:
        path: Where it is.
        found: What was in the official file, in words.
        is_new: False if an earlier import had made it already.
    """

    path: Path
    found: str
    is_new: bool = True


def import_path(path: str | Path, out: str | Path, *, prefix: str | None = None) -> Imported:
    """Convert a network pickle, a file of reference statistics, or a folder of snapshots.

    What an earlier import made of the same files is kept.

    Args:
        path: The file or folder.
        out: Folder for the result; a folder of snapshots becomes this folder.
        prefix: Training to choose from a folder that holds snapshots of several.

    Returns:
        A model file for `edm2 sample`, statistics, or a folder for `edm2 ema reconstruct`.

    Raises:
        ValueError: If it is something else. Nothing in it is run in any case.
        FileExistsError: If something else is in the result's place.
    """
    path, out = Path(path), Path(out)
    if path.is_dir():
        return _import_snapshots(path, out, prefix)
    if prefix is not None:
        raise ValueError(f"{path} is one file: a prefix chooses one of the training runs in a folder")
    target = out / _model_name(path.name)
    if target.exists():
        return _kept(target, path.name, sha256_of(path))
    if path.suffix == ".npz":
        return _save_statistics(path, read_reference_statistics(path), target)
    content = read_pickle(path)
    if type(content) is dict and "ema" in content:
        return _save_network(network_of(path, content), target)
    if type(content) is dict and ("fid" in content or "fd_dinov2" in content):
        return _save_statistics(path, statistics_of(path, content), target)
    raise refusal(path, "neither a network under 'ema' nor statistics under 'fid' or 'fd_dinov2'")


def import_named(
    name: str, out: str | Path, *, source: str | None = None, sha256: Sequence[str] = ()
) -> list[Imported]:
    """Fetch and convert one official file by its name.

    Args:
        name: Such as `edm2-img64-s-1073741-0.075.pkl`.
        out: Folder for the result; what an earlier import made of the file is kept.
        source: See `edm2.interop.fetch.fetch`.
        sha256: Expected hash, if known.

    Raises:
        ValueError: As in `fetch` and `import_path`.
        FileExistsError: If something else is in the result's place.
        OSError: As in `fetch`.
    """
    return _import_fetched([name], Path(out), source, sha256)


def import_preset(
    preset: SamplingPreset, out: str | Path, *, source: str | None = None, sha256: Sequence[str] = ()
) -> list[Imported]:
    """Fetch and convert the networks of a published setting, and write the setting next to them.

    Args:
        preset: See `edm2.interop.released.sampling_preset`.
        out: Folder for the models and `{preset}.json`; what an earlier import made is kept.
        source: See `edm2.interop.fetch.fetch`.
        sha256: Expected hashes of network and guide, if known.

    Raises:
        ValueError: As in `fetch` and `import_path`.
        FileExistsError: If something else is in the place of the setting or of a model.
        OSError: As in `fetch`.
    """
    path = Path(out) / f"{preset.name}.json"
    networks = [str(network) for network in (preset.network, preset.guide) if network is not None]
    models = [_model_name(name) for name in networks]
    guide = models[1] if preset.guide is not None else None
    settings = {
        "format": "edm2.sampling/1",
        "preset": preset.name,
        "model": models[0],
        "guide": guide,
        "guidance": preset.guidance,
        "reported": {"metric": preset.metric, "value": preset.reported},
        "license": LICENCE,
    }
    content = (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()
    is_there = path.exists()
    if is_there and path.read_bytes() != content:
        raise _occupied(path, f"the setting {preset.name}")
    imported = _import_fetched(networks, Path(out), source, sha256)
    if not is_there:
        write_atomic(path, content)
    weight = f", guided with weight {preset.guidance:g} by {guide}" if guide else ", without a guide"
    found = f"settings of {preset.metric} {preset.reported:g}{weight}"
    return [*imported, Imported(path=path, found=found, is_new=not is_there)]


def _import_fetched(
    names: Sequence[str], out: Path, source: str | None, sha256: Sequence[str]
) -> list[Imported]:
    """Fetch and convert one file after the other; those converted stay if a later one fails."""
    if sha256 and len(sha256) != len(names):
        raise ValueError(
            f"{len(sha256)} hashes for {len(names)} files ({', '.join(names)}): give one each, in that order"
        )
    hashes: Sequence[str | None] = sha256 or [None] * len(names)
    kept = {}
    for name, known in zip(names, hashes, strict=True):
        target = out / _model_name(name)
        if target.exists():
            kept[name] = _kept(target, name, known)
    check_there([name for name in names if name not in kept], source)
    imported: list[Imported] = []
    for name, known in zip(names, hashes, strict=True):
        try:
            imported.append(kept.get(name) or _fetch_and_convert(name, out, source, known))
        except (ValueError, OSError) as error:
            _remove_empty(out / _DOWNLOADS)
            if not imported:
                raise
            done = ", ".join(str(one.path) for one in imported)
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{error}. Kept for the next time: {done}") from error
        for path in (out / _DOWNLOADS).rglob(f"{glob.escape(name)}*"):
            path.unlink()  # of this run, or of one that was killed
    _remove_empty(out / _DOWNLOADS)
    return imported


def _fetch_and_convert(name: str, out: Path, source: str | None, sha256: str | None) -> Imported:
    file = fetch(name, source, out / _DOWNLOADS, sha256=sha256)
    try:
        return import_path(file, out)
    except ValueError:
        if out / _DOWNLOADS in file.parents:  # a bad download is not worth keeping
            file.unlink()
        raise


def _remove_empty(downloads: Path) -> None:
    for folder in (*downloads.glob("*/"), downloads):
        with contextlib.suppress(OSError):  # parts of downloads that can be continued
            folder.rmdir()


def _model_name(name: str) -> str:
    return f"{Path(name).stem}.safetensors"


def _kept(target: Path, name: str, sha256: str | None) -> Imported:
    """A file that is there already, if an earlier import made it of an official file of this name and hash."""
    source = _source_in(target)
    if source.get("file") != name or (sha256 is not None and source.get("sha256") != sha256.lower()):
        raise _occupied(target, name)
    return Imported(path=target, found=name, is_new=False)


def _occupied(path: Path, name: str) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already and was not made from {name}: choose another --out or move it away"
    )


def _source(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_of(path)}


def _source_in(path: Path) -> Any:
    """What `_source` gave when a model or statistics were written; empty for other files."""
    header = read_header(path)
    return header.get("info", header).get("source") or {}


def _save_network(network: NetworkFile, target: Path) -> Imported:
    tensors = network.read_tensors()
    info: dict[str, Any] = {**model_info(network), "source": _source(network.path)}
    name = parse_name(network.path.name)
    if name is not None:
        info |= {"sigma_rel": name.sigma_rel, "num_images": name.num_images}
    write_notice(target.parent)
    save_model(target, network.options, tensors, info)
    return Imported(path=target, found=_describe(network, name))


def _describe(network: NetworkFile, name: SnapshotName | None) -> str:
    side, channels, classes = (
        network.options[key] for key in ("img_resolution", "img_channels", "label_dim")
    )
    numbers = sum(tensor.numel for tensor in network.parameters.values())
    text = f"network of {numbers:,} parameters for {channels} x {side} x {side}, "
    text += f"{classes} classes" if classes else "unconditional"
    if name is not None:
        text += f", after {name.num_images:,} images, EMA length {name.sigma_rel:g}"
    return text


def _save_statistics(path: Path, found: dict[str, ReferenceStatistics], target: Path) -> Imported:
    tensors = {}
    for metric, moments in found.items():
        tensors[f"{metric}.mu"] = torch.from_numpy(moments.mean)
        tensors[f"{metric}.sigma"] = torch.from_numpy(moments.cov)
    num_images = next(iter(found.values())).num_images
    header = {
        "num_images": num_images,
        "source": _source(path),
        "license": LICENCE,
        "license_notice": NOTICE_LINE,
    }
    write_notice(target.parent)
    write_atomic(target, safetensors.torch.save(tensors, to_metadata(REFERENCE_FORMAT, header)))
    sizes = ", ".join(f"{metric} of {len(moments.mean)} features" for metric, moments in found.items())
    count = f"{num_images:,} images" if num_images is not None else "an unknown number of images"
    return Imported(path=target, found=f"reference statistics of {count}: {sizes}")


def _import_snapshots(folder: Path, out: Path, prefix: str | None) -> Imported:
    source = open_snapshots(folder, prefix=prefix)
    snapshots = source.manifest.snapshots
    times, widths = len({s.t for s in snapshots}), sorted({s.sigma_rel for s in snapshots})
    lengths = ", ".join(f"{width:g}" for width in widths)
    found = f"{len(snapshots)} snapshots of {times} times, EMA lengths {lengths}"
    files = {name: sha256_of(folder / name) for name in source.files}
    run = replace(source.manifest.run, metadata={**(source.manifest.run.metadata or {}), "files": files})
    # Not `replacing_folder`, whose lock on the folder would be waited for by the writer of snapshots.
    work = out.resolve().with_name(f".{out.resolve().name}.importing")
    with claimed(work, out):
        try:
            is_new = not out.exists() or not any(out.iterdir())
            if is_new:
                _write_snapshots(source, run, work / out.name)
                os.replace(work / out.name, out)
                sync_folder(out.resolve().parent)
            elif _files_in(out) != files:
                raise _occupied(out, str(folder))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Imported(path=out, found=found, is_new=is_new)


def _write_snapshots(source: ForeignSnapshots, run: RunInfo, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)  # of an import that was killed
    snapshots = source.manifest.snapshots
    for t, group in groupby(snapshots, key=lambda s: s.t):
        at_once = list(group)
        one = partial(write_one, aside, run, t=t, dtype=at_once[0].dtype)
        make = partial(map, one, (_track(source, snapshot) for snapshot in at_once))
        write(aside, run, t=t, layout=source.manifest.layout, make=make)
    _keep_rounding(aside, snapshots)
    write_notice(aside)


def _files_in(folder: Path) -> Any:
    """Hashes of the official files that a folder of snapshots was made from; None for other folders."""
    try:
        return (read_manifest(folder).run.metadata or {}).get("files")
    except ValueError:
        return None


def _track(source: ForeignSnapshots, snapshot: Snapshot) -> Track:
    file = source.files[snapshot.file]
    copied = set(json.loads(file.metadata["copied"]))
    tensors = dict(read_tensors(file, list(file.specs)))
    averaged = {name: x.float() for name, x in tensors.items() if name not in copied}
    return Track(
        sigma_rel=snapshot.sigma_rel,
        shapes={name: tuple(x.shape) for name, x in averaged.items()},
        largest={name: largest_value(x) for name, x in averaged.items()},
        read=averaged.__getitem__,
        copied={name: x for name, x in tensors.items() if name in copied},
        distance=snapshot.distance,
        updates=0,  # `_keep_rounding` puts the official files' own in its place
    )


def _keep_rounding(folder: Path, before: Sequence[Snapshot]) -> None:
    """Storing them again lost nothing, but the official code had rounded them before."""
    manifest = read_manifest(folder)
    rounding = {(s.t, s.sigma_rel): s.rounding for s in before}
    kept = tuple(replace(s, rounding=rounding[s.t, s.sigma_rel]) for s in manifest.snapshots)
    write_manifest(folder, replace(manifest, snapshots=kept))
