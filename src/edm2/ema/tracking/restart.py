"""Averages as they were stored, to go on from."""

from collections.abc import Sequence
from pathlib import Path

from edm2.ema.reconstruct import Reconstruction, reconstruct_many
from edm2.ema.storage.manifest import RunInfo, read_manifest


def stored_tracks(
    folder: str | Path, sigma_rels: Sequence[float], t: float | None
) -> tuple[RunInfo, list[Reconstruction]]:
    """Averages as they are stored, of one time, with their run.

    Args:
        folder: Folder that `PowerEMA.snapshot` wrote.
        sigma_rels: Widths of the tracks.
        t: Time of the snapshot. Default: the last one.

    Raises:
        ValueError: If one of them is not stored, or a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    times = sorted({s.t for s in manifest.snapshots})
    t = times[-1] if t is None and times else t
    stored = [s.sigma_rel for s in manifest.snapshots if s.t == t]
    missing = [s for s in sigma_rels if s not in stored]
    if missing:
        raise ValueError(
            f"{folder} has no snapshot of sigma_rel {missing[0]:g} at t {t}: it has widths {stored} then, and"
            f" times {times}"
        )
    return manifest.run, reconstruct_many(folder, sigma_rels, t)
