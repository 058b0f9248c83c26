"""Checkpoints: folders of safetensors and JSON with a manifest, whole or not there.

checkpoints/000000012800/{model,optimizer,ema}.safetensors, state.json, manifest.json
"""

import itertools
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from edm2.ema.storage.tensorfile import TensorSpec, write_tensors
from edm2.files import reason, remedy, remove_folder, replacing_folder, sha256_of, write_json

_MANIFEST = "manifest.json"
_STATE = "state.json"

Tensors = dict[str, dict[str, Tensor]]
Role = Literal["passing", "regular", "milestone"]


def save_checkpoint(
    folder: Path,
    num_images: int,
    groups: Tensors,
    state: dict[str, Any],
    *,
    keep: int,
    role: Role = "regular",
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, then drop those that are no longer wanted.

    Args:
        folder: where the run's checkpoints lie.
        num_images: images seen, the checkpoint's name.
        groups: file name without suffix -> tensors by name.
        state: JSON values.
        keep: number of checkpoints to keep, the newest.
        role: passing: written out of turn, as when a run is stopped; the next checkpoint takes its place, so
            that a run that was stopped leaves the same checkpoints as one that never was. milestone: never
            dropped.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it could not be written; older checkpoints are untouched then.
    """
    final = folder / f"{num_images:012d}"
    try:
        with replacing_folder(final, flush=False) as aside:
            files = {}
            for name, tensors in groups.items():
                file = f"{name}.safetensors"
                files[file] = _write_tensors(aside / file, tensors)
            write_json(aside / _STATE, state)
            files[_STATE] = {
                "num_bytes": (aside / _STATE).stat().st_size,
                "sha256": sha256_of(aside / _STATE),
            }
            write_json(aside / _MANIFEST, {"num_images": num_images, "role": role, "files": files})
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write checkpoint {final} ({reason(error)}): older checkpoints are untouched; {remedy(error)} "
            "and run the same command again",
        ) from error
    prune(folder, keep=keep)
    return final


def prune(folder: Path, *, keep: int) -> None:
    """Drop what interrupted writes left, and checkpoints that are no longer wanted.

    Args:
        folder: where the run's checkpoints lie.
        keep: number of regular ones to keep, the newest; milestones stay, passing ones only while they are
            the newest.
    """
    if not folder.exists():
        return
    _remove_strays(folder)
    names = _names(folder)
    roles = {name: _role(folder / name) for name in names}
    in_turn = [name for name in names if roles[name] != "passing"]
    wanted = {*names[-1:], *in_turn[-keep:], *(n for n in names if roles[n] == "milestone")}
    for name in names:
        if name not in wanted:
            remove_folder(folder / name)


def find_newest(folder: Path, *, run_id: str) -> Path | None:
    """Find the newest whole checkpoint; damaged ones that are passed over are named, and renamed to stay.

    Args:
        folder: where the run's checkpoints lie.
        run_id: of the run; a checkpoint of another one counts as damaged.

    Returns:
        The checkpoint; None where there is none at all.

    Raises:
        ValueError: if there are checkpoints and all are damaged.
    """
    names = _names(folder)
    problems: list[str] = []
    for name in reversed(names):
        problem = verify(folder / name, run_id=run_id)
        if problem is None:
            for damaged in [n for n in names if n > name]:
                os.replace(folder / damaged, _free_name(folder, damaged))
            for text in problems:
                warnings.warn(f"{text}; it is kept as .damaged, the run goes on from {name}", stacklevel=2)
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
    """The newest checkpoint, whole or not; None where there is none."""
    names = _names(folder)
    return folder / names[-1] if names else None


def read_checkpoint(checkpoint: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by file and name, and the state."""
    groups = {p.stem: safetensors.torch.load_file(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    return groups, json.loads((checkpoint / _STATE).read_text())


def verify(checkpoint: Path, *, run_id: str) -> str | None:
    """What is wrong with a checkpoint of a run, in words; None where it is whole."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        if _STATE not in files:
            raise KeyError(_STATE)
        for name, facts in files.items():
            path = checkpoint / name
            if not path.exists():
                return f"checkpoint {checkpoint} is damaged: {name} is missing"
            if path.stat().st_size != facts["num_bytes"] or sha256_of(path) != facts["sha256"]:
                return f"checkpoint {checkpoint} is damaged: {name} is not as it was written"
        found = json.loads((checkpoint / _STATE).read_text())["run_id"]
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
        role = json.loads((checkpoint / _MANIFEST).read_text())["role"]
    except (OSError, ValueError, KeyError, TypeError):
        return "regular"
    return role if role in ("passing", "milestone") else "regular"


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
