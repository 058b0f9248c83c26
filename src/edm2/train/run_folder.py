"""The folder of a training run: its settings, its snapshots, and who may write to it."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edm2.diffusion import MODEL_FILE
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.storage.replacing import folder_lock
from edm2.ema.storage.snapshots import damaged
from edm2.files import read_sealed, write_sealed

CONFIG_FILE = "config.json"
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"
TEACHER = "teacher"  # of a student's run, written before the run begins


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep other processes from training into the folder; create it if missing.

    Raises:
        ValueError: If another process is training into it.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if made:  # refused settings leave nothing behind
            stack.callback(_remove_if_empty, out)
        try:
            stack.enter_context(folder_lock(out, wait=False))
        except BlockingIOError:
            raise ValueError(
                f"another process is training into {out} now: wait until it ends, or choose another --out"
            ) from None
        yield


def claim(out: Path, settings: dict[str, Any], identity: dict[str, Any], run_id: str) -> None:
    """Make the folder this run's own, or check that it already is.

    Args:
        out: Folder of the run; created if missing.
        settings: All settings, for the reader.
        identity: Settings that must not change between sessions.
        run_id: Derived from identity and data.

    Raises:
        ValueError: If the folder holds another run or other files; nothing is changed.
    """
    path = out / CONFIG_FILE
    if path.exists():
        old = read_config(out)
        if old["run_id"] != run_id:
            raise ValueError(
                f"{out} holds another run ({difference(old['identity'], identity)}): choose another --out, or "
                "give the same settings to continue that run"
            )
    else:
        check_free(out)
        # A run has this folder from the start, so that its loss is noticed.
        (out / CHECKPOINTS).mkdir(parents=True)
    write_sealed(path, {"run_id": run_id, "identity": identity, "settings": settings})


def check_free(out: Path) -> None:
    """Refuse a folder that is neither empty nor holds a run.

    Raises:
        ValueError: If it holds other files.
    """
    if (out / CONFIG_FILE).exists() or not out.exists():
        return
    # Left by a kill before the settings were written.
    _remove_if_empty(out / CHECKPOINTS)
    left = (f".{CONFIG_FILE}.tmp", TEACHER)
    if foreign := sorted(p.name for p in out.iterdir() if p.name not in left):
        raise ValueError(
            f"{out} is not empty and holds no run ({', '.join(foreign[:4])}): choose another --out"
        )


def check_not_lost(out: Path) -> None:
    """Refuse a run whose checkpoints are missing.

    An empty checkpoint folder belongs to a run that was killed before its first checkpoint: it starts again.

    Raises:
        ValueError: If the run is finished but has no checkpoint, or its checkpoint folder is missing.
    """
    done = (out / MODEL_FILE).exists()
    if done or not (out / CHECKPOINTS).is_dir():
        raise ValueError(
            f"{out} holds a {'finished ' if done else ''}run whose checkpoints are missing: restore "
            f"{out / CHECKPOINTS} from a copy, choose another --out, or delete {out} to train from the beginning"
        )


def find_lost_snapshots(out: Path, times: Sequence[int], sigma_rels: Sequence[float]) -> list[str]:
    """Find snapshots that the run took and that are missing or damaged. Checks sizes and headers, not contents.

    Args:
        out: Folder of the run.
        times: Images seen at each snapshot that was taken.
        sigma_rels: Lengths of the averages that were stored each time.

    Returns:
        One sentence for each missing or damaged file.
    """
    folder = out / SNAPSHOTS
    if not times:
        return []
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    stored = {(s.t, s.sigma_rel) for s in manifest.snapshots}
    missing = [
        f"the snapshot of {t} images with EMA length {sigma_rel:g} is missing"
        for t, sigma_rel in itertools.product(times, sigma_rels)
        if (t, sigma_rel) not in stored
    ]
    return [*missing, *damaged(folder, manifest, read=False)]


def read_config(out: Path) -> dict[str, Any]:
    """Read the settings that `claim` wrote.

    Raises:
        ValueError: If they are missing or damaged.
    """
    path = out / CONFIG_FILE
    try:
        content = read_sealed(path)
        kinds = {"run_id": str, "identity": dict, "settings": dict}
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is not a {kind.__name__}")
    except FileNotFoundError:
        if not out.exists():
            raise ValueError(
                f"{out} does not exist: give the folder that was the --out of `edm2 train`"
            ) from None
        raise ValueError(
            f"{out} is not a training run: {CONFIG_FILE} is missing. Give the folder that was the --out of `edm2 train`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it from a copy, or choose another --out"
        ) from error
    return content


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Say which settings differ, up to four of them."""
    old, new = flat_settings(old), flat_settings(new)
    parts = [
        f"{key} {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return "; ".join(parts[:4]) or "the images have changed"


def flat_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings: `network.dropout` for `dropout` in `network`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in flat_settings(value).items()}
        else:
            flat[key] = value
    return flat
