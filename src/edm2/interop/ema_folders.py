"""Folders of averages that other libraries wrote, opened as snapshots with the profiles that the averages really have.

ema-pytorch, nitrous-ema and pytorch-posthoc-ema update their averages every few steps, but with the decay of a single
step. Their files therefore hold wider profiles than their names say, and their own synthesis solves for the wrong ones.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edm2.ema.maths.profiles import FloatArray, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2.ema.maths.targets import TableProfile
from edm2.ema.storage.encoding import STORED
from edm2.ema.storage.manifest import ForeignSnapshots, Manifest, RunInfo, Snapshot, layout_digest
from edm2.ema.storage.tensorfile import TensorFile
from edm2.ema.storage.weighted_sums import sample_squares
from edm2.interop.torch_file import open_torch_file

_NAME = re.compile(r"(\d+)\.(\d+)\.pt")
_PREFIX = "ema_model."
_STATE = ("initted", "step", "_extra_state")
_DTYPES = {dtype: name for name, dtype in STORED.items()}
_LIBRARIES = "ema-pytorch, nitrous-ema or pytorch-posthoc-ema"
_LATE_START = 99  # pytorch-posthoc-ema ignores 99 steps by default (update_after_step=100)
_MOST_EDGES = 8192
_MOST_BREAKS = 256
_SAMPLE = 1 << 16
_CHECKED = 64


@dataclass(frozen=True, kw_only=True)
class _File:
    """One average of the folder: number of its track, step in its name, and what it holds."""

    track: int
    step: int
    path: Path
    tensors: TensorFile
    values: Mapping[str, Tensor]
    inner_step: float
    integers: frozenset[str]


def is_ema_folder(folder: str | Path) -> bool:
    """Whether a folder holds files named like those of these libraries: `0.1000.pt`, `1.1000.pt`, ..."""
    return Path(folder).is_dir() and any(_NAME.fullmatch(p.name) for p in Path(folder).glob("*.pt"))


def open_ema_folder(
    path: str | Path,
    *,
    sigma_rels: Sequence[float] | None = None,
    update_every: int | None = None,
    step_size_correction: bool = False,
) -> ForeignSnapshots:
    """Open a checkpoint folder of ema-pytorch, nitrous-ema or pytorch-posthoc-ema for `edm2.ema.reconstruct`.

    The files are not changed, and nothing in them is executed (`weights_only=True`). The profile of each average
    follows from the library's update rule, its settings and the step in the file's name.

    Args:
        path: Folder of files such as `0.1000.pt`: number of the track, then step.
        sigma_rels: EMA lengths of the tracks, as given to `PostHocEMA`, in its order. If you gave gammas, convert
            them with `gamma_to_sigma_rel`.
        update_every: Steps between updates, as given to `PostHocEMA`. The default of ema-pytorch and nitrous-ema is
            100, that of pytorch-posthoc-ema 10.
        step_size_correction: Whether nitrous-ema was given `step_size_correction=True`.

    Returns:
        The snapshots. Pass them to `edm2.ema.reconstruct` in place of a folder; time counts training steps.

    Raises:
        ValueError: If a setting is missing or does not fit the files, there are no such files, or they belong to
            several runs or models.

    Ref: docs/ema.md.
    """
    folder = Path(path)
    named = _named(folder)
    _check_settings(folder, named, sigma_rels, update_every)
    assert sigma_rels is not None
    assert update_every is not None
    files = [_read(*entry) for entry in named]
    _check_same_model(files)
    late = _steps_before_first_update(files)
    gammas = [sigma_rel_to_gamma(s) for s in sigma_rels]
    integers = frozenset.intersection(*(f.integers for f in files))
    averaged = [
        n for n, spec in files[0].tensors.specs.items() if n not in integers and spec.dtype.is_floating_point
    ]
    if not any(files[0].tensors.specs[name].numel for name in averaged):
        raise ValueError(f"{files[0].path} holds whole numbers alone, which are not averaged: leave it out")
    _check_same_run(files, averaged)
    profiles = {
        f.path.name: update_profile(
            f.step, gammas[f.track], update_every, late=late, step_size_correction=step_size_correction
        )
        for f in files
    }
    copied = json.dumps(sorted(files[0].tensors.specs.keys() - set(averaged)))
    shapes = {name: spec.shape for name, spec in files[0].tensors.specs.items()}
    run = RunInfo(run_id=folder.resolve().name, clock="steps", start=0.0, aliases={}, metadata=None)
    updates = [max(1, (f.step - late - 1) // update_every + 1) for f in files]
    return ForeignSnapshots(
        folder=folder,
        manifest=Manifest(
            run=run,
            layout=layout_digest(shapes),
            snapshots=tuple(
                _snapshot(f, gammas[f.track], averaged, count)
                for f, count in zip(files, updates, strict=True)
            ),
        ),
        files={f.path.name: replace(f.tensors, metadata={"copied": copied}) for f in files},
        profiles=profiles,
        interval=update_every if update_every > 1 else 0.0,
    )


def update_profile(
    step: int, gamma: float, update_every: int, *, late: int = 0, step_size_correction: bool = False
) -> TableProfile:
    """Profile of an average that these libraries updated every few steps.

    An update at the library's step c leaves `(1 - 1/(c + 1))**(gamma + 1)` of the average, however many steps lie
    between updates; the first one copies the weights. The share of each later update is spread over the steps around
    it, which may lie half an interval after `step`.

    Args:
        step: Training step at which the average was stored.
        gamma: Exponent that the library was given.
        update_every: Steps between updates.
        late: Training steps before the library counted the first one.
        step_size_correction: nitrous-ema's variant, which raises the decay to the power of `update_every`.
    """
    steps = np.arange(1, step - late + 1, update_every, dtype=np.float64)
    logs = np.log(steps / (steps + 1))
    if step_size_correction:
        logs = (logs + np.log1p(-1 / (steps + 1 + update_every))) * update_every / 2
    kept = (gamma + 1) * (np.sum(logs) - np.cumsum(logs))  # log of the mass of all updates up to each
    # Windows are the same in all files, so that they agree about the weights of each update. The first update counts
    # for its step alone: with few updates it still holds most of the mass.
    starts = late + steps[1:] - 0.5 - update_every / 2
    edges = np.concatenate([[late, late + 1.0], starts, starts[-1:] + update_every])
    mass = np.exp(kept[[0, *range(kept.size)]] if steps.size > 1 else kept)
    mass = np.concatenate([[0.0], mass])
    keep = np.append(np.diff(edges) > 0, True)
    edges, mass = edges[keep], mass[keep]
    if edges.size > _MOST_EDGES:
        chosen = np.sin(np.linspace(0, np.pi / 2, _MOST_EDGES)) ** 2 * (edges.size - 1)
        index = np.unique(chosen.round().astype(np.int64))
        edges, mass = edges[index], mass[index]
    breaks = edges[1:-1] if edges.size <= _MOST_BREAKS else edges[1:2]
    return TableProfile(edges, mass, breaks=tuple(breaks.tolist()))


def _named(folder: Path) -> list[tuple[int, int, Path]]:
    """Track, step and path of each file, by step."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the checkpoint folder of {_LIBRARIES}")
    matches = [(match, p) for p in folder.iterdir() if (match := _NAME.fullmatch(p.name)) is not None]
    named = sorted((int(m[2]), int(m[1]), p) for m, p in matches if len(m[2]) < 16 and int(m[2]) > 0)
    if not named:
        raise ValueError(
            f"{folder} holds no averages named like 0.1000.pt: give the checkpoint folder of {_LIBRARIES}"
        )
    return [(track, step, path) for step, track, path in named]


def _check_settings(
    folder: Path,
    named: Sequence[tuple[int, int, Path]],
    sigma_rels: Sequence[float] | None,
    update_every: int | None,
) -> None:
    tracks = sorted({track for track, _, _ in named})
    if sigma_rels is None or update_every is None:
        missing = [
            name for name, x in (("sigma_rels", sigma_rels), ("update_every", update_every)) if x is None
        ]
        raise ValueError(
            f"the files of {folder} do not say which averages they hold: give {' and '.join(missing)} as PostHocEMA got"
            " them (update_every is 100 by default in ema-pytorch and nitrous-ema, 10 in pytorch-posthoc-ema)"
        )
    if update_every < 1:
        raise ValueError(
            f"update_every {update_every} must be at least 1: give the value that PostHocEMA got"
        )
    if tracks != list(range(len(sigma_rels))):
        raise ValueError(
            f"{folder} holds tracks {', '.join(map(str, tracks))}, but {len(sigma_rels)} sigma_rels are given: give one"
            " for each track, in the order of PostHocEMA"
        )


def _read(track: int, step: int, path: Path) -> _File:
    opened = open_torch_file(path)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in opened.values) else ""
    names = {
        name.removeprefix(prefix): name
        for name in opened.values
        if name.startswith(prefix) and (prefix or name not in _STATE)
    }
    inner = opened.values.get("step", opened.others.get("_extra_state", {}))
    if isinstance(inner, dict):
        inner = inner.get("step")
    if not names or not isinstance(inner, int | Tensor):
        raise ValueError(f"{path} is not an average of {_LIBRARIES}: leave it out")
    values = {new: opened.values[old] for new, old in names.items()}
    broken = next((n for n, x in values.items() if not bool(torch.isfinite(x).all())), None)
    if broken is not None:
        raise ValueError(
            f"{path} holds values that are not finite in {broken!r}: leave out files from that step on"
        )
    return _File(
        track=track,
        step=step,
        path=path,
        tensors=replace(
            opened.file,
            specs={new: opened.file.specs[old] for new, old in names.items()},
            offsets={new: opened.file.offsets[old] for new, old in names.items()},
        ),
        values=values,
        inner_step=float(inner),
        integers=frozenset(n for n, x in values.items() if bool((x == x.round()).all())),
    )


def _check_same_model(files: Sequence[_File]) -> None:
    first = files[0]
    for file in files:
        ours, theirs = ({n: (s.shape, s.dtype) for n, s in f.tensors.specs.items()} for f in (first, file))
        differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if differing:
            raise ValueError(
                f"{file.path} and {first.path} hold different models: {len(differing)} tensors are missing, new, or of"
                f" another shape or type, first {differing[0]!r}; move the files of each run to a folder of their own"
            )


def _steps_before_first_update(files: Sequence[_File]) -> int:
    """Steps that the library ignored at first, from its own counts, which it may have rounded to float16."""
    low, high = 0.0, math.inf
    for file in files:
        if math.isfinite(file.inner_step):
            # Half of the spacing of float16 (11 digits) or bfloat16 (8), none for exact integers.
            stored_as = next(iter(file.values.values())).dtype
            digits = {torch.float16: 11, torch.bfloat16: 8}.get(stored_as, 24)
            slack = 2.0 ** (math.frexp(max(file.inner_step, 1.0))[1] - digits - 1)
            slack = slack if slack >= 0.5 else 0.0
            low = max(low, file.step - file.inner_step - slack)
            high = min(high, file.step - file.inner_step + slack)
        if low > high:
            raise ValueError(
                f"{file.path} counts {file.inner_step:g} steps inside, which does not fit the other files: they"
                " belong to several runs, or the average was started again; move the files of each run to a"
                " folder of their own"
            )
    if low <= 0:
        return 0
    return _LATE_START if low <= _LATE_START <= high else math.ceil(low)


def _check_same_run(files: Sequence[_File], names: Sequence[str]) -> None:
    """Refuse files whose weights lie so far apart that they come from different training runs."""
    sizes = [_square_of(f.values, names) for f in files]
    jumps: list[tuple[float, _File, _File]] = []
    for first in range(0, len(files), _CHECKED - 1):
        part = files[first : first + _CHECKED]
        squares = sample_squares([f.tensors for f in part], names, [{}] * len(part))
        for i in range(1, len(part)):
            size = sizes[first + i] + sizes[first + i - 1]
            jumps.append((squares[i - 1, i] / max(size, 1e-30), part[i - 1], part[i]))
    if not jumps:
        return
    usual = float(np.median([jump for jump, _, _ in jumps]))
    jump, before, after = max(jumps, key=lambda entry: entry[0])
    # Weights of two trainings are about orthogonal: a jump of 1. Within one they hardly move from file to file.
    if jump > 0.5 or (len(jumps) > 4 and jump > max(0.05, 30 * usual)):
        raise ValueError(
            f"{before.path} and {after.path} lie {math.sqrt(jump):.0%} apart, as weights of different training runs"
            " do: move the files of each run to a folder of their own"
        )


def _square_of(values: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return sum(float(_sample(values[n]).square().mean()) * values[n].numel() for n in names)


def _sample(x: Tensor) -> Tensor:
    return x.reshape(-1)[:: max(1, x.numel() // _SAMPLE)].double()


def _snapshot(file: _File, gamma: float, averaged: Sequence[str], updates: int) -> Snapshot:
    norm = math.sqrt(_square_of(file.values, averaged))
    sigma_rel = gamma_to_sigma_rel(gamma)
    # Each update rounds the average to float32, and forgets a part of the older roundings.
    remembered = max(min(updates, file.step / (2 * (gamma + 1))), 0.5)
    arithmetic = 2.0**-24.5 * math.sqrt(remembered)
    rounding = math.sqrt(sum(_rounding_square(file.values[n]) for n in averaged)) / (norm or 1.0)
    return Snapshot(
        file=file.path.name,
        t=float(file.step),
        sigma_rel=round(sigma_rel, 9),
        gamma=gamma,
        dtype=_DTYPES.get(file.tensors.specs[averaged[0]].dtype, "fp32"),
        num_bytes=file.path.stat().st_size,
        sha256="",
        header_sha256="",
        data_sum="",
        norm=norm,
        rounding=math.hypot(rounding, arithmetic),
        distance=math.nan,
    )


def _rounding_square(x: Tensor) -> float:
    """Expected squared rounding error of a tensor in its type: a twelfth of the squared spacing of each element."""
    sample = _sample(x)
    digits, smallest = {torch.float16: (11, 2.0**-24), torch.bfloat16: (8, 0.0)}.get(x.dtype, (24, 0.0))
    spacing: FloatArray = np.ldexp(1.0, np.frexp(sample.numpy())[1] - digits)
    return float(np.mean(np.maximum(spacing, smallest) ** 2)) / 12 * x.numel()
