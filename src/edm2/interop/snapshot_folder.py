"""Folders of snapshots that the official training code wrote, read in place by `edm2.ema`."""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.storage.encoding import STORED, TYPICAL_ROUNDING
from edm2.ema.storage.manifest import ForeignSnapshots, Manifest, RunInfo, Snapshot, layout_digest
from edm2.ema.storage.tensorfile import TensorFile, TensorSpec
from edm2.interop.model_info import model_info
from edm2.interop.network_file import NetworkFile, read_network
from edm2.interop.pickle_file import refusal
from edm2.interop.pickle_values import StoredTensor

_NAME = re.compile(r"(?P<prefix>.+)-(?P<thousands>\d{7,12})-(?P<sigma_rel>\d\.\d{3})\.pkl")
_DTYPES = {dtype: name for name, dtype in STORED.items()}
_SAMPLE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SnapshotName:
    """The parts of an official network file's name.

    Attributes:
        prefix: Name of the run or model.
        num_images: Training images seen.
        sigma_rel: EMA length.
    """

    prefix: str
    num_images: int
    sigma_rel: float

    def __str__(self) -> str:
        return f"{self.prefix}-{self.num_images // 1000:07d}-{self.sigma_rel:.3f}.pkl"


def parse_name(name: str) -> SnapshotName | None:
    """Parse the name of an official network file.

    Args:
        name: File name such as `edm2-img64-s-1073741-0.075.pkl`, without folders.

    Returns:
        Its parts, or None for a file that is named in another way.

    Ref: docs/released_models.md.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    thousands, sigma_rel = int(match["thousands"]), float(match["sigma_rel"])
    num_images = -(-thousands * 1000 // 1024) * 1024  # the multiple of 1024 among the name's thousand
    if num_images == 0 or num_images // 1000 != thousands or not 0 < sigma_rel < 0.2887:
        return None
    return SnapshotName(prefix=match["prefix"], num_images=num_images, sigma_rel=sigma_rel)


def open_snapshots(folder: str | Path, *, prefix: str | None = None) -> ForeignSnapshots:
    """Open a folder of network pickles of one training as snapshots for `edm2.ema.reconstruct`.

    The files stay as they are; reconstruction reads the numbers inside them. Nothing in them is executed.

    Args:
        folder: Folder of files called `{prefix}-{thousands of images}-{sigma_rel}.pkl`.
        prefix: Which training, if the folder holds several.

    Returns:
        The snapshots; pass them to `edm2.ema.reconstruct` in place of a folder.

    Raises:
        ValueError: If there are no such files, they are of several trainings or networks, or a file holds
            anything but a network.
    """
    folder = Path(folder)
    named = _named(folder, prefix)
    networks = [read_network(folder / str(name)) for name in named]
    _check_same(networks)
    first = networks[0]
    info = model_info(first)
    run = RunInfo(
        run_id=named[0].prefix,
        clock="images",
        start=0.0,
        aliases={},
        metadata={"network": first.options, "info": info},
    )
    files = {network.path.name: _tensor_file(network) for network in networks}
    snapshots = [_snapshot(name, network) for name, network in zip(named, networks, strict=True)]
    layout = layout_digest(
        {name: tensor.shape for name, tensor in {**first.parameters, **first.buffers}.items()}
    )
    return ForeignSnapshots(
        folder=folder,
        manifest=Manifest(run=run, layout=layout, snapshots=tuple(snapshots)),
        files=files,
    )


def _named(folder: Path, prefix: str | None) -> list[SnapshotName]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder of network-snapshot-*.pkl files")
    found: dict[str, list[SnapshotName]] = defaultdict(list)
    others = []
    for path in sorted(folder.glob("*.pkl")):
        name = parse_name(path.name)
        if name is None:
            others.append(path.name)
        else:
            found[name.prefix].append(name)
    if not found:
        raise ValueError(
            f"{folder} holds no snapshots named like network-snapshot-0000008-0.050.pkl: give the folder that"
            " the training wrote them to"
        )
    if prefix is None and len(found) > 1:
        raise ValueError(
            f"{folder} holds snapshots of {len(found)} training runs ({', '.join(found)}): choose one by prefix"
        )
    if prefix is not None and prefix not in found:
        raise ValueError(f"{folder} holds no snapshots of {prefix!r}; there are {', '.join(found)}")
    if others:
        warnings.warn(
            f"{folder}: {len(others)} files without an image count and EMA length in their names are left out"
            f" ({', '.join(others[:3])})",
            stacklevel=3,
        )
    chosen = found[prefix if prefix is not None else next(iter(found))]
    return sorted(chosen, key=lambda name: (name.num_images, name.sigma_rel))


def _check_same(networks: Sequence[NetworkFile]) -> None:
    first = networks[0]
    for network in networks:
        if network.options != first.options:
            raise ValueError(
                f"{network.path} and {first.path} are of different networks: move one training's files to a folder"
                " of their own"
            )
        for name, tensor in {**network.parameters, **network.buffers}.items():
            if not tensor.contiguous:
                raise refusal(network.path, f"a {name} whose numbers are not in row-major order")
        if len({_DTYPES.get(tensor.dtype) for tensor in network.parameters.values()} - {None}) != 1:
            raise refusal(network.path, "parameters of several types, or of float64")


def _tensor_file(network: NetworkFile) -> TensorFile:
    tensors = {**network.parameters, **network.buffers}
    return TensorFile(
        path=network.path,
        specs={name: TensorSpec(name=name, dtype=x.dtype, shape=x.shape) for name, x in tensors.items()},
        offsets={name: x.file_offset for name, x in tensors.items()},
        metadata={"copied": json.dumps(sorted(network.buffers))},
        header_sha256="",
    )


def _snapshot(name: SnapshotName, network: NetworkFile) -> Snapshot:
    dtype = _DTYPES[next(iter(network.parameters.values())).dtype]
    return Snapshot(
        file=network.path.name,
        t=float(name.num_images),
        sigma_rel=name.sigma_rel,
        gamma=sigma_rel_to_gamma(name.sigma_rel),
        dtype=dtype,
        num_bytes=network.path.stat().st_size,
        sha256="",
        header_sha256="",
        data_sum="",
        norm=math.sqrt(sum(_square(tensor) for tensor in network.parameters.values())),
        rounding=TYPICAL_ROUNDING[dtype],
        distance=math.nan,
    )


def _square(tensor: StoredTensor) -> float:
    """Sum of the squares of a tensor, from its first numbers: rows of a weight have much the same norm."""
    size = tensor.dtype.itemsize
    raw = np.frombuffer(tensor.data[: _SAMPLE * size], np.uint8).copy()
    sample = torch.from_numpy(raw).view(tensor.dtype).double()
    return float(sample.square().mean()) * math.prod(tensor.shape)
