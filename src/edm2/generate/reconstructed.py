"""Models with any EMA length from a run's snapshots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edm2.diffusion import MODEL_FILE, Denoiser, read_model_header, save_model
from edm2.diffusion.description import build_on_meta, check_info
from edm2.ema import Reconstruction, reconstruct_many
from edm2.ema.storage.manifest import ForeignSnapshots, read_manifest
from edm2.train.logs import read_log
from edm2.train.run_folder import CHECKPOINTS, CONFIG_FILE, SNAPSHOTS, read_config


def snapshots_of(run: str | Path) -> Path:
    """Return the folder of snapshots in a run's folder, or the path itself, which may be one.

    Raises:
        ValueError: If the path is a file, or a run that has not written a snapshot yet.
    """
    run = Path(run)
    folder = run / SNAPSHOTS
    if run.is_file():
        raise ValueError(
            f"{run} is a file: an EMA length is reconstructed from the snapshots in the folder of a run"
        )
    if not _is_run(run):
        return folder if folder.is_dir() else run
    if not (run / MODEL_FILE).exists() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{run} has no snapshot yet: {_first_snapshot(run)}; train on until then")
    return folder


def _is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS).is_dir()


def _first_snapshot(run: Path) -> str:
    settings, log = read_config(run)["settings"], read_log(run)
    try:
        every, total = settings["snapshot_images"], settings["num_images"]
        # As `TrainConfig.snapshot_interval` has it; the end of the run gets one in any case.
        first = min(math.ceil(total / 2) if every is None else every, total)
        seen = log[-1]["num_images"] if log else 0
        return f"the first comes after {first:,} training images, and the log reaches {seen:,}"
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run / CONFIG_FILE} is damaged ({error}): restore it from a copy") from error


def read_info(path: str | Path, sigma_rel: float | None = None) -> dict[str, Any]:
    """What a saved model says about itself, or with an EMA length, what a run's snapshots say; reads no weights.

    Raises:
        ValueError: if there is no model, or none yet.
    """
    if sigma_rel is not None:
        info: dict[str, Any] = _metadata(path, read_manifest(snapshots_of(path)).run.metadata)["info"]
        return info
    path = Path(path)
    if (_is_run(path) or (path / SNAPSHOTS).is_dir()) and not (path / MODEL_FILE).exists():
        snapshots_of(path)  # says so if there is none yet
        raise ValueError(
            f"{path} is an unfinished run, which has no final model yet: name an EMA length, --ema 0.1 "
            "(sigma_rel=0.1 in Python), to reconstruct it from its snapshots"
        )
    info = read_model_header(path)[1]["info"]
    return info


def ema_file_name(sigma_rel: float) -> str:
    """File name of a model with an EMA length, with all its digits: no two lengths share one."""
    return f"ema-{float(sigma_rel)!r}.safetensors"


def reconstruct_models(
    run: str | Path | ForeignSnapshots,
    sigma_rels: Sequence[float],
    out: str | Path,
    *,
    t: float | None = None,
) -> list[tuple[Path, float]]:
    """Write one model file for each wanted EMA length.

    Args:
        run: folder of a training run, or of its snapshots; or official snapshots.
        sigma_rels: wanted lengths.
        out: folder for files called `ema-0.1.safetensors`, after their lengths.
        t: time in images; default: that of the last snapshot.

    Returns:
        Each file with the relative L2 error to expect of its parameters.

    Raises:
        ValueError: as in `edm2.ema.reconstruct`, or if the snapshots are not of an edm2 network.
        FileExistsError: if a file of that name is there.
    """
    if len(set(sigma_rels)) < len(sigma_rels):
        raise ValueError(f"EMA lengths {list(sigma_rels)} must be different")
    names = [ema_file_name(sigma_rel) for sigma_rel in sigma_rels]
    for name in names:
        if (Path(out) / name).exists():
            raise FileExistsError(f"{Path(out) / name} exists already: choose another --out or move it away")
    source, folder = (run, run.folder) if isinstance(run, ForeignSnapshots) else (snapshots_of(run), run)
    results = reconstruct_many(source, sigma_rels, t)
    written = []
    for name, result in zip(names, results, strict=True):
        network, info = _description(folder, result)
        written.append((save_model(Path(out) / name, network, result.tensors, info), result.expected_error))
    return written


def reconstruct_denoiser(
    run: str | Path, sigma_rel: float, t: float | None = None
) -> tuple[Denoiser, dict[str, Any]]:
    """A model with one EMA length, in memory; arguments and errors as in `reconstruct_models`.

    Returns:
        The denoiser in eval mode, without gradients, and its `info`.
    """
    result = reconstruct_many(snapshots_of(run), [sigma_rel], t)[0]
    network, info = _description(run, result)
    denoiser = build_on_meta(network)
    try:
        denoiser.load_state_dict(result.tensors, assign=True)
    except (ValueError, RuntimeError) as error:
        raise _damaged(run, error) from error
    return denoiser.requires_grad_(False), info


def _description(run: str | Path, result: Reconstruction) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = _metadata(run, result.metadata)
    return metadata["network"], {
        **metadata["info"],
        "sigma_rel": result.sigma_rel,
        "num_images": int(result.t),
        "run_id": result.run_id,
        "expected_error": result.expected_error,
    }


def _metadata(run: str | Path, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """What the snapshots say of their network, where it can be one."""
    if not isinstance(metadata, dict) or "network" not in metadata:
        raise ValueError(
            f"{run} holds snapshots of a model that edm2 did not train: use edm2.ema.reconstruct in Python, and "
            "load its tensors into your model"
        )
    network, info = metadata["network"], metadata.get("info")
    if not isinstance(network, dict) or not isinstance(info, dict):
        raise _damaged(run, "no table of network and info")
    try:
        build_on_meta(network)
        check_info(info)
    except ValueError as error:
        raise _damaged(run, error) from error
    return metadata


def _damaged(run: str | Path, reason: object) -> ValueError:
    text = " ".join(str(reason).split())[:300]
    return ValueError(
        f"the snapshots of {run} are not those of the network that they describe ({text}): restore them from a copy"
    )
