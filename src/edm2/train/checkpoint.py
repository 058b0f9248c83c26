"""Checkpoints: folders of safetensors and JSON with a manifest, whole or not there.

checkpoints/000000012800/{model,optimizer,ema}.safetensors, state.json, manifest.json
"""

import itertools
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from edm2.files import sha256_of, sync_folder, write_atomic, write_json

_MANIFEST = "manifest.json"
_STATE = "state.json"


def save_checkpoint(
    folder: Path,
    num_images: int,
    groups: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
    passing: bool = False,
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, then drop the oldest ones.

    Args:
        folder: where the run's checkpoints lie.
        num_images: images seen, the checkpoint's name.
        groups: file name without suffix -> tensors by name.
        state: JSON values.
        keep: number of checkpoints to keep, the newest.
        passing: written out of turn, as when a run is stopped; the next checkpoint takes its place, so that a
            run that was stopped leaves the same checkpoints as one that never was.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it could not be written; older checkpoints are untouched then.
    """
    final = folder / f"{num_images:012d}"
    aside = folder / f".{final.name}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.glob(".*.tmp"):
        shutil.rmtree(stray)
    try:
        for name, tensors in groups.items():
            contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            write_atomic(aside / f"{name}.safetensors", safetensors.torch.save(contiguous))
        write_json(aside / _STATE, state)
        files = {
            p.name: {"num_bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(aside.iterdir())
        }
        write_json(aside / _MANIFEST, {"num_images": num_images, "passing": passing, "files": files})
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            error.errno,
            f"could not write checkpoint {final} ({error.strerror}): older checkpoints are untouched; make room and "
            "run the same command again",
        ) from error
    sync_folder(folder)
    prune(folder, keep=keep)
    return final


def prune(folder: Path, *, keep: int) -> None:
    """Drop all but the newest checkpoints, and those written out of turn that have a successor."""
    for name in [n for n in _names(folder)[:-1] if _is_passing(folder / n)] + _names(folder)[:-keep]:
        shutil.rmtree(folder / name, ignore_errors=True)


def load_newest(folder: Path, *, run_id: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read the newest whole checkpoint; damaged ones that are passed over are named, and renamed to stay.

    Args:
        folder: where the run's checkpoints lie.
        run_id: of the run; a checkpoint of another one counts as damaged.

    Returns:
        Tensors by file and name, and the state; None where there is no checkpoint at all.

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
            return _read(folder / name)
        problems.append(problem)
    if problems:
        raise ValueError(
            f"no checkpoint can be used: {'; '.join(problems)}. Restore one from a copy, or choose another --out to "
            "start afresh"
        )
    return None


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
        found = json.loads((checkpoint / _STATE).read_text())["ema"]["run_id"]
    except FileNotFoundError:
        return f"checkpoint {checkpoint} is damaged: {_MANIFEST} is missing"
    except OSError as error:
        return f"checkpoint {checkpoint} is damaged: it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"checkpoint {checkpoint} is damaged: {_MANIFEST} cannot be read"
    return None if found == run_id else f"checkpoint {checkpoint} is of another run, {found}"


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def _is_passing(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / _MANIFEST).read_text())["passing"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _free_name(folder: Path, name: str) -> Path:
    free = folder / f"{name}.damaged"
    for i in itertools.count(2):
        if not free.exists():
            break
        free = folder / f"{name}.damaged{i}"
    return free


def _read(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    groups = {p.stem: safetensors.torch.load_file(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    return groups, json.loads((checkpoint / _STATE).read_text())
