"""From official files to safetensors, with their licence beside them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from edm2.diffusion import read_model_header, save_model
from edm2.ema.storage.encoding import Track
from edm2.ema.storage.manifest import ForeignSnapshots, Snapshot, read_manifest, write_manifest
from edm2.ema.storage.snapshots import write
from edm2.ema.storage.weighted_sums import read_tensors
from edm2.files import replacing_folder, sha256_of, write_atomic, write_json
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

_DOWNLOADS = ".downloads"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One file or folder that was written.

    Attributes:
        path: where.
        found: what was in the official file, in words.
    """

    path: Path
    found: str


def import_path(path: str | Path, out: str | Path, *, prefix: str | None = None) -> Imported:
    """Convert a network pickle, a file of reference statistics, or a folder of snapshots.

    Args:
        path: the file or folder.
        out: folder for what is made of it; a folder of snapshots becomes this folder.
        prefix: which training, for a folder that holds snapshots of several.

    Returns:
        What was written: a model file for `edm2 sample`, statistics, or a folder for `edm2 ema reconstruct`.

    Raises:
        ValueError: if it is none of these; nothing in it is run in any case.
        FileExistsError: if the result is there already.
    """
    path, out = Path(path), Path(out)
    if path.is_dir():
        return _import_snapshots(path, out, prefix)
    if prefix is not None:
        raise ValueError(f"{path} is one file: a prefix chooses among the trainings of a folder")
    target = _free(out / _model_name(path.name))
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
        name: such as `edm2-img64-s-1073741-0.075.pkl`.
        out: folder for what is made of it.
        source: see `edm2.interop.fetch.fetch`.
        sha256: expected hash, if known.
    """
    return _import_fetched([name], Path(out), source, sha256)


def import_preset(
    preset: SamplingPreset, out: str | Path, *, source: str | None = None, sha256: Sequence[str] = ()
) -> list[Imported]:
    """Fetch and convert the networks of a published setting, and write the setting beside them.

    Args:
        preset: see `edm2.interop.released.sampling_preset`.
        out: folder for the models and `{preset}.json`; models that were made there before are used.
        source: see `edm2.interop.fetch.fetch`.
        sha256: expected hashes of network and guide, if known.

    Raises:
        FileExistsError: if the setting, or another file by the name of a model, is there already.
    """
    out = Path(out)
    settings = _free(out / f"{preset.name}.json")
    networks = [str(network) for network in (preset.network, preset.guide) if network is not None]
    _check_hashes(networks, sha256)
    hashes = dict(zip(networks, sha256, strict=False))
    missing = [name for name in networks if not _is_model_of(out, name, hashes.get(name))]
    written = _import_fetched(missing, out, source, [hashes[name] for name in missing] if hashes else ())
    model = _model_name(str(preset.network))
    guide = None if preset.guide is None else _model_name(str(preset.guide))
    write_json(
        settings,
        {
            "format": "edm2.sampling/1",
            "preset": preset.name,
            "model": model,
            "guide": guide,
            "guidance": preset.guidance,
            "reported": {"metric": preset.metric, "value": preset.reported},
            "license": LICENCE,
        },
    )
    weight = f", guided with weight {preset.guidance:g} by {guide}" if guide else ", without a guide"
    return [
        *written,
        Imported(path=settings, found=f"settings of {preset.metric} {preset.reported:g}{weight}"),
    ]


def _import_fetched(
    names: Sequence[str], out: Path, source: str | None, sha256: Sequence[str]
) -> list[Imported]:
    """Fetch and convert one file after the other; what was converted stays whatever happens to the next."""
    _check_hashes(names, sha256)
    for name in names:
        _free(out / _model_name(name))
    check_there(names, source)
    downloads = out / _DOWNLOADS
    hashes: Sequence[str | None] = sha256 or [None] * len(names)
    written: list[Imported] = []
    for name, known in zip(names, hashes, strict=True):
        try:
            file = fetch(name, source, downloads, sha256=known)
            written.append(_convert_fetched(file, out, downloads))
        except (ValueError, OSError) as error:
            _remove_if_empty(downloads)
            if not written:
                raise
            there = ", ".join(str(done.path) for done in written)
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{error}. Kept for the next time: {there}") from error
    _remove_if_empty(downloads)
    return written


def _convert_fetched(file: Path, out: Path, downloads: Path) -> Imported:
    downloaded = file.parent == downloads
    try:
        done = import_path(file, out)
    except ValueError:  # a bad download is not worth keeping
        if downloaded:
            file.unlink()
        raise
    if downloaded:
        file.unlink()
    return done


def _remove_if_empty(folder: Path) -> None:
    # Else it holds the part of a download that was cut off.
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _check_hashes(names: Sequence[str], sha256: Sequence[str]) -> None:
    if sha256 and len(sha256) != len(names):
        raise ValueError(
            f"{len(sha256)} hashes for {len(names)} files ({', '.join(names)}): give one each, in that order"
        )


def _model_name(name: str) -> str:
    return f"{Path(name).stem}.safetensors"


def _free(path: Path) -> Path:
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another --out or move it away")
    return path


def _is_model_of(out: Path, name: str, sha256: str | None) -> bool:
    path = out / _model_name(name)
    if not path.exists():
        return False
    source = read_model_header(path)[1]["info"].get("source") or {}
    if source.get("file") != name or (sha256 is not None and source.get("sha256") != sha256.lower()):
        raise FileExistsError(
            f"{path} exists already and was not made from {name}: choose another --out or move it away"
        )
    return True


def _source(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_of(path)}


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
        "format": REFERENCE_FORMAT,
        "num_images": num_images,
        "source": _source(path),
        "license": LICENCE,
        "license_notice": NOTICE_LINE,
    }
    write_notice(target.parent)
    content = safetensors.torch.save(tensors, metadata={"edm2": json.dumps(header, sort_keys=True)})
    write_atomic(target, content)
    sizes = ", ".join(f"{metric} of {len(moments.mean)} features" for metric, moments in found.items())
    count = f"{num_images:,} images" if num_images is not None else "an unknown number of images"
    return Imported(path=target, found=f"reference statistics of {count}: {sizes}")


def _import_snapshots(folder: Path, out: Path, prefix: str | None) -> Imported:
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists already and is not empty: choose another --out or move it away")
    source = open_snapshots(folder, prefix=prefix)
    snapshots = source.manifest.snapshots
    with replacing_folder(out.resolve(), flush=False) as aside:
        for t, group in groupby(snapshots, key=lambda s: s.t):
            at_once = list(group)
            tracks = (_track(source, snapshot) for snapshot in at_once)
            write(
                aside,
                source.manifest.run,
                t=t,
                layout=source.manifest.layout,
                tracks=tracks,
                dtype=at_once[0].dtype,
            )
        _keep_rounding(aside, snapshots)
        write_notice(aside)
    times, widths = len({s.t for s in snapshots}), sorted({s.sigma_rel for s in snapshots})
    lengths = ", ".join(f"{width:g}" for width in widths)
    return Imported(path=out, found=f"{len(snapshots)} snapshots of {times} times, EMA lengths {lengths}")


def _track(source: ForeignSnapshots, snapshot: Snapshot) -> Track:
    file = source.files[snapshot.file]
    copied = set(json.loads(file.metadata["copied"]))
    tensors = dict(read_tensors(file, list(file.specs)))
    return Track(
        sigma_rel=snapshot.sigma_rel,
        averaged={name: x.float() for name, x in tensors.items() if name not in copied},
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
