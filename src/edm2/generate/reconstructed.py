"""Models with any EMA length from a run's snapshots."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edm2.diffusion import MODEL_FILE, Denoiser, read_model_header, save_model
from edm2.diffusion.description import build_from, check_info
from edm2.diffusion.own_network import UnregisteredNetworkError
from edm2.ema import Reconstruction, reconstruct_many
from edm2.ema.reconstruct import reconstruct_each
from edm2.ema.storage.manifest import ForeignSnapshots, read_manifest
from edm2.ema.storage.tensorfile import read_header, save_tensors
from edm2.train.logs import read_log
from edm2.train.residual import copy_regression
from edm2.train.run_folder import CHECKPOINTS, CONFIG_FILE, SNAPSHOTS
from edm2.train.settings_file import run_settings


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
    config, log = run_settings(run), read_log(run)
    first = min(config.snapshot_interval, config.num_images)  # the end of the run gets one in any case
    seen = log[-1]["num_images"] if log else 0
    return f"the first comes after {first:,} training images, and the log reaches {seen:,}"


def read_info(path: str | Path, sigma_rel: float | None = None) -> dict[str, Any]:
    """Information in a saved model, or with an EMA length, in a run's snapshots; reads no weights.

    Raises:
        ValueError: If there is no model, or none yet.
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
    tracks: Sequence[float] | None = None,
    skip_existing: bool = False,
) -> list[tuple[Path, float]]:
    """Write one model file for each wanted EMA length; of models that edm2 did not train, a file of tensors.

    Files that an earlier call wrote from the same snapshots are kept, so that an interrupted call can be repeated.

    Args:
        run: Folder of a training run, or of its snapshots; or official snapshots.
        sigma_rels: Wanted lengths.
        out: Folder for files called `ema-0.1.safetensors`, after their lengths.
        t: Time in images. Default: that of the last snapshot.
        tracks: Use the snapshots of these lengths only. Default: all.
        skip_existing: Keep every file that exists, whatever it was made from.

    Returns:
        Each file with the expected relative L2 error of its parameters.

    Raises:
        ValueError: As in `edm2.ema.reconstruct`, or if the snapshots do not fit the network that they describe.
        FileExistsError: If a file of that name exists and holds another average.
    """
    source = run if isinstance(run, ForeignSnapshots) else snapshots_of(run)
    save: Callable[[Path, Reconstruction], None] = _save_tensors
    facts = _tensor_facts
    if "network" in (read_manifest(source).run.metadata or {}):
        folder = run.folder if isinstance(run, ForeignSnapshots) else run
        save, facts = functools.partial(_save_model, folder), _model_facts
    return list(_written(source, sigma_rels, Path(out), t, tracks, skip_existing, save, facts))


def _save_model(run: str | Path, path: Path, result: Reconstruction) -> None:
    network, info = _description(run, result)
    save_model(path, network, result.tensors, info)
    if "residual" in info:
        copy_regression(Path(run), path.parent)


def _model_facts(path: Path) -> dict[str, object]:
    info = read_model_header(path)[1]["info"]
    return {"run_id": info.get("run_id"), "t": info.get("num_images"), "error": info.get("expected_error")}


def _save_tensors(path: Path, result: Reconstruction) -> None:
    facts = ("label", "t", "clock", "run_id", "expected_error")
    save_tensors(path, result.tensors, {name: str(getattr(result, name)) for name in facts})


def _tensor_facts(path: Path) -> dict[str, object]:
    found = read_header(path).metadata
    return {"run_id": found.get("run_id"), "t": found.get("t"), "error": found.get("expected_error")}


def _written(
    source: Path | ForeignSnapshots,
    sigma_rels: Sequence[float],
    out: Path,
    t: float | None,
    tracks: Sequence[float] | None,
    skip_existing: bool,
    save: Callable[[Path, Reconstruction], None],
    facts: Callable[[Path], dict[str, object]],
) -> Iterator[tuple[Path, float]]:
    """Reconstruct and save the averages whose files are missing, as many at a time as fit into memory."""
    if len(set(sigma_rels)) < len(sigma_rels):
        raise ValueError(f"EMA lengths {list(sigma_rels)} must be different")
    expected = reconstruct_many(source, sigma_rels, t, tracks=tracks, read=False)
    paths = {s: out / ema_file_name(s) for s in sigma_rels}
    missing = []
    for i, result in enumerate(expected):
        path = paths[sigma_rels[i]]
        if not path.exists():
            missing.append(i)
        elif not skip_existing and not _is_same(facts, path, result):
            raise FileExistsError(
                f"{path} exists already and holds another average: choose another --out, move it away, or keep it with"
                " --skip-existing"
            )
    made = reconstruct_each(
        source, sigma_rels, expected[0].t, tracks=tracks, warn_above=math.inf, only=missing
    )
    for i, result in enumerate(expected):
        if i in missing:
            try:
                save(paths[sigma_rels[i]], next(made))
            except FileExistsError:  # another process wrote it meanwhile
                if not _is_same(facts, paths[sigma_rels[i]], result):
                    raise
        yield paths[sigma_rels[i]], result.expected_error


def _is_same(facts: Callable[[Path], dict[str, object]], path: Path, result: Reconstruction) -> bool:
    """Whether a file holds this average, as far as its header tells."""
    try:
        found = facts(path)
        error, t = (float(found[name]) for name in ("error", "t"))  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError):
        return False
    return (
        found["run_id"] == result.run_id
        and t in (result.t, int(result.t))
        and math.isclose(error, result.expected_error, rel_tol=1e-3)
    )


def reconstruct_denoiser(
    run: str | Path, sigma_rel: float, t: float | None = None
) -> tuple[Denoiser, dict[str, Any]]:
    """A model with one EMA length, in memory; arguments and errors as in `reconstruct_models`.

    Returns:
        The denoiser in eval mode, without gradients, and its `info`.
    """
    result = reconstruct_many(snapshots_of(run), [sigma_rel], t)[0]
    network, info = _description(run, result)
    denoiser = build_from(network)
    load_averages(denoiser, run, result, assign=True)
    return denoiser.requires_grad_(False), info


def load_averages(
    denoiser: Denoiser, run: str | Path, result: Reconstruction, *, assign: bool = False
) -> None:
    """Load reconstructed weights into the network of a run.

    Args:
        denoiser: The network.
        run: Where its snapshots are, for messages.
        result: The weights.
        assign: Whether the tensors themselves become the network's, instead of their values.

    Raises:
        ValueError: If they do not fit the network.
    """
    try:
        denoiser.load_state_dict(result.tensors, assign=assign)
    except (ValueError, RuntimeError) as error:
        raise _damaged(run, error) from error


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
        build_from(network)
        check_info(info)
    except UnregisteredNetworkError as error:
        raise ValueError(f"{run}: {error}") from None
    except ValueError as error:
        raise _damaged(run, error) from error
    return metadata


def _damaged(run: str | Path, reason: object) -> ValueError:
    text = " ".join(str(reason).split())[:300]
    return ValueError(
        f"the snapshots of {run} are not those of the network that they describe ({text}): restore them from a copy"
    )
