"""Checkpoints: folders of safetensors and JSON with a manifest; a checkpoint is complete or absent.

checkpoints/000000012800/{model,optimizer,ema}.safetensors, state.json, manifest.json

A sharded run has a file for each process, such as model-00002-of-00004.safetensors, with its rows of each tensor.
"""

import itertools
import os
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edm2.ema.storage.tensorfile import TensorSpec, write_tensors
from edm2.files import (
    make_folder,
    read_json,
    read_sealed,
    reason,
    remedy,
    remove_folder,
    replacing_folder,
    sha256_of,
    write_json,
    write_sealed,
)
from edm2.train.world import World

_MANIFEST = "manifest.json"
_STATE = "state.json"

Tensors = dict[str, dict[str, Tensor]]
Role = Literal["passing", "best", "regular", "milestone"]


def save_checkpoint(
    folder: Path,
    num_images: int,
    groups: Tensors,
    state: dict[str, Any],
    *,
    keep: int,
    role: Role = "regular",
    best: Collection[int] = (),
) -> Path:
    """Write a checkpoint atomically, then delete unwanted ones.

    Args:
        folder: Folder of the run's checkpoints.
        num_images: Images seen, which name the checkpoint.
        groups: File name without suffix -> tensors by name.
        state: JSON values.
        keep: Number of newest checkpoints to keep.
        role: "passing" for a checkpoint out of turn, as when a run is stopped: the next one replaces it, so that
            an interrupted run leaves the same checkpoints as an uninterrupted one. "best": kept while it is among
            `best`. "milestone": never deleted.
        best: See `prune`.

    Returns:
        Folder of the checkpoint.

    Raises:
        OSError: If it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"{num_images:012d}"
    try:
        with replacing_folder(final, flush=False) as aside:
            files = {
                f"{name}.safetensors": _write_tensors(aside / f"{name}.safetensors", tensors)
                for name, tensors in groups.items()
            }
            _complete(aside, num_images, files, state, role)
    except OSError as error:
        raise _unwritten(final, error) from error
    prune(folder, keep=keep, best=best)
    return final


def save_in_parts(
    folder: Path,
    num_images: int,
    groups: Tensors,
    state: dict[str, Any],
    *,
    keep: int,
    role: Role = "regular",
    best: Collection[int] = (),
    world: World,
) -> None:
    """Write a checkpoint atomically, each process its part; a collective call. Otherwise like `save_checkpoint`.

    Args:
        folder: Folder of the run's checkpoints, visible to all processes.
        num_images: Images seen, which name the checkpoint.
        groups: File name without suffix -> this process's rows of tensors by name.
        state: JSON values; those of the first process count.
        keep: Number of newest checkpoints to keep.
        role: See `save_checkpoint`.
        best: See `prune`.
        world: The processes.

    Raises:
        OSError: If a process cannot write; older checkpoints are untouched.
    """
    final, aside = folder / f"{num_images:012d}", folder / f".{num_images:012d}.parts.tmp"

    def clear() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        make_folder(aside)

    def publish() -> None:
        try:
            with replacing_folder(final, flush=False) as whole:
                files: dict[str, Any] = {}
                for listing in sorted(aside.glob("*.json")):
                    files |= read_json(listing)
                for name in files:
                    os.replace(aside / name, whole / name)
                _complete(whole, num_images, files, state, role)
        except OSError as error:
            raise _unwritten(final, error) from error
        shutil.rmtree(aside, ignore_errors=True)
        prune(folder, keep=keep, best=best)

    world.on_first(clear)
    part, failed = f"{world.rank + 1:05d}-of-{world.size:05d}", None
    try:
        names = {f"{group}-{part}.safetensors": tensors for group, tensors in groups.items() if tensors}
        files = {name: _write_tensors(aside / name, tensors) for name, tensors in names.items()}
        write_json(aside / f"{part}.json", files)
    except OSError as error:
        failed = error
    if world.any(failed is not None):
        if failed is not None:
            raise _unwritten(final, failed) from failed
        raise OSError(f"another process could not write its part of checkpoint {final}: see its own error")
    world.on_first(publish)


def _complete(aside: Path, num_images: int, files: dict[str, Any], state: dict[str, Any], role: Role) -> None:
    """Write what makes tensors a checkpoint."""
    write_json(aside / _STATE, state)
    files[_STATE] = {"num_bytes": (aside / _STATE).stat().st_size, "sha256": sha256_of(aside / _STATE)}
    write_sealed(aside / _MANIFEST, {"num_images": num_images, "role": role, "files": files})


def _unwritten(final: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"could not write checkpoint {final} ({reason(error)}): older checkpoints are untouched; {remedy(error)} "
        "and run the same command again",
    )


def prune(folder: Path, *, keep: int, best: Collection[int] = ()) -> None:
    """Delete leftovers of interrupted writes, and unwanted checkpoints.

    Args:
        folder: Folder of the run's checkpoints.
        keep: Number of newest regular checkpoints to keep. Milestones stay; a passing one stays while it is the
            newest.
        best: Numbers of checkpoints to keep, whatever their role.
    """
    if not folder.exists():
        return
    _remove_strays(folder)
    names = _names(folder)
    roles = {name: _role(folder / name) for name in names}
    in_turn = [name for name in names if roles[name] not in ("passing", "best")]
    wanted = {*names[-1:], *in_turn[-keep:]}
    wanted |= {name for name in names if roles[name] == "milestone" or int(name) in best}
    for name in names:
        if name not in wanted:
            remove_folder(folder / name)


def find_newest(folder: Path, *, run_id: str) -> Path | None:
    """Find the newest intact checkpoint. Newer damaged ones are named in a warning and kept as `.damaged`.

    Args:
        folder: Folder of the run's checkpoints.
        run_id: Name of the run; a checkpoint of another run counts as damaged.

    Returns:
        The checkpoint; None if there are none.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    names = _names(folder)
    problems: list[str] = []
    for name in reversed(names):
        problem = verify(folder / name, run_id=run_id)
        if problem is None:
            for damaged in [n for n in names if n > name]:
                os.replace(folder / damaged, _free_name(folder, damaged))
            for text in problems:
                warnings.warn(
                    f"{text}; it is kept as .damaged, and the run continues from {name}", stacklevel=2
                )
            return folder / name
        problems.append(problem)
    lost = sorted(p.name for p in folder.glob("*.damaged*"))
    if problems or lost:
        raise ValueError(
            f"no checkpoint can be used: {'; '.join(problems) or f'{folder} holds only {lost[0]}'}. Restore one "
            "from a copy, or choose another --out to start afresh"
        )
    return None


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, intact or not; None if there are none."""
    names = _names(folder)
    return folder / names[-1] if names else None


def read_checkpoint(checkpoint: Path) -> tuple["StoredTensors", dict[str, Any]]:
    """Open a checkpoint's tensors, and read its state."""
    return StoredTensors(checkpoint), read_json(checkpoint / _STATE, finite=False)


class StoredTensors:
    """Tensors of a checkpoint, read one at a time as they are needed, whole or some of their rows.

    Args:
        checkpoint: Folder of an intact checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._parts: dict[str, dict[str, list[Any]]] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):  # parts in the order of their rows
            group = self._parts.setdefault(path.stem.partition("-")[0], {})
            try:
                file: Any = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error
            for name in file.keys():  # noqa: SIM118 - it is not a dictionary
                group.setdefault(name, []).append(file)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of `model`, `optimizer` or `ema`."""
        return list(self._parts.get(group, {}))

    def read(self, group: str, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor.

        Args:
            group: `model`, `optimizer` or `ema`.
            name: Name of the tensor.
            rows: First row to read, and the end; None for all.

        Raises:
            KeyError: If there is no sampler of that name.
        """
        files = self._parts[group][name]
        if rows is None and len(files) == 1:
            return cast(Tensor, files[0].get_tensor(name))
        found: list[Tensor] = []
        start = 0
        for file in files:
            count = file.get_slice(name).get_shape()[0]
            low, high = (0, count) if rows is None else (max(rows[0] - start, 0), min(rows[1] - start, count))
            if low < high:
                found.append(file.get_tensor(name)[low:high])  # mapped from the file, not read as a whole
            start += count
        if not found:
            return cast(Tensor, files[0].get_tensor(name)[:0])
        return found[0] if len(found) == 1 else torch.cat(found)


def verify(checkpoint: Path, *, run_id: str) -> str | None:
    """Return what is wrong with a checkpoint, as a sentence; None if it is intact."""
    try:
        files = read_sealed(checkpoint / _MANIFEST)["files"]
        if _STATE not in files:
            raise KeyError(_STATE)
        for name, facts in files.items():
            path = checkpoint / name
            if not path.exists():
                return f"checkpoint {checkpoint} is damaged: {name} is missing"
            if path.stat().st_size != facts["num_bytes"] or sha256_of(path) != facts["sha256"]:
                return f"checkpoint {checkpoint} is damaged: {name} is not as it was written"
        found = read_json(checkpoint / _STATE, finite=False)["run_id"]
    except FileNotFoundError:
        return f"checkpoint {checkpoint} is damaged: {_MANIFEST} is missing"
    except OSError as error:
        return f"checkpoint {checkpoint} is damaged: it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"checkpoint {checkpoint} is damaged: {_MANIFEST} cannot be read"
    return None if found == run_id else f"checkpoint {checkpoint} is of another run, {found}"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    specs = [TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in tensors.items()]
    sums = write_tensors(path, specs, lambda name: tensors[name].detach().cpu(), {})
    return {"num_bytes": sums.num_bytes, "sha256": sums.sha256}


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def _role(checkpoint: Path) -> Role:
    try:
        role = read_sealed(checkpoint / _MANIFEST)["role"]
    except (OSError, ValueError, KeyError, TypeError):
        return "regular"
    return role if role in get_args(Role) else "regular"


def _remove_strays(folder: Path) -> None:
    for stray in folder.glob(".*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)


def _free_name(folder: Path, name: str) -> Path:
    free = folder / f"{name}.damaged"
    for i in itertools.count(2):
        if not free.exists():
            break
        free = folder / f"{name}.damaged{i}"
    return free
