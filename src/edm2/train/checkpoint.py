"""Checkpoints: folders of safetensors and JSON with a manifest; a checkpoint is complete or absent.

checkpoints/000000012800/{model,optimizer,ema}.safetensors, state.json, manifest.json
"""

import itertools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from edm2.ema.storage.tensorfile import TensorSpec, write_tensors
from edm2.files import (
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
    """Write a checkpoint atomically, then delete unwanted ones.

    Args:
        folder: Folder of the run's checkpoints.
        num_images: Images seen, which name the checkpoint.
        groups: File name without suffix -> tensors by name.
        state: JSON values.
        keep: Number of newest checkpoints to keep.
        role: "passing" for a checkpoint out of turn, as when a run is stopped: the next one replaces it, so that
            an interrupted run leaves the same checkpoints as an uninterrupted one. "milestone": never deleted.

    Returns:
        Folder of the checkpoint.

    Raises:
        OSError: If it cannot be written; older checkpoints are untouched.
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
            write_sealed(aside / _MANIFEST, {"num_images": num_images, "role": role, "files": files})
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write checkpoint {final} ({reason(error)}): older checkpoints are untouched; {remedy(error)} "
            "and run the same command again",
        ) from error
    prune(folder, keep=keep)
    return final


def prune(folder: Path, *, keep: int) -> None:
    """Delete leftovers of interrupted writes, and unwanted checkpoints.

    Args:
        folder: Folder of the run's checkpoints.
        keep: Number of newest regular checkpoints to keep. Milestones stay; a passing one stays while it is the
            newest.
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


def read_checkpoint(checkpoint: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint's tensors, by file and name, and its state."""
    groups = {p.stem: safetensors.torch.load_file(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    return groups, read_json(checkpoint / _STATE, finite=False)


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
