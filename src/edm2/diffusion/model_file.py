"""Saved models: one safetensors file whose header says how to build the network it holds."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edm2.diffusion.denoiser import Denoiser
from edm2.files import write_atomic

MODEL_FILE = "model.safetensors"
_KIND, _VERSION = "edm2.model", "1"
_KEY = "edm2"


def save_model(
    path: str | Path,
    network: dict[str, Any],
    tensors: dict[str, Tensor],
    info: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model as one self-describing safetensors file.

    Args:
        path: the file, or a folder, where it becomes `model.safetensors`.
        network: the denoiser's constructor arguments, `Denoiser.config`.
        tensors: its state, by name.
        info: what else a user of the model needs, as JSON values: pixel coding, class names, EMA length.
        overwrite: replace a file that is there.

    Returns:
        The file written.

    Raises:
        FileExistsError: if the file is there already.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / MODEL_FILE
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name or move it away")
    # One metadata key only: safetensors does not keep the order of several, and equal models are equal bytes.
    description = {"format": f"{_KIND}/{_VERSION}", "network": network, "info": info or {}}
    header = json.dumps(description, sort_keys=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(contiguous, metadata={_KEY: header}))
    return path


def read_model_header(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Find a model's file and read its description without its tensors.

    Args:
        path: a model file, or a folder that holds `model.safetensors` or just one .safetensors file.

    Returns:
        The file, and a dict with `network` and `info`.

    Raises:
        ValueError: if there is no such file, it is damaged, or it is no edm2 model.
    """
    file = _find(Path(path))
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or no safetensors file ({error}): restore it from a copy"
        ) from error
    try:
        header = json.loads(metadata[_KEY])
        kind, _, version = header["format"].partition("/")
        if kind != _KIND or not isinstance(header["network"], dict) or not isinstance(header["info"], dict):
            raise KeyError("format")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{file} holds tensors but no description of an edm2 model: give a file that `edm2 train` or "
            "`edm2 ema reconstruct` wrote"
        ) from None
    if version != _VERSION:
        raise ValueError(
            f"{file} has format version {version}, and this edm2 reads version {_VERSION}: use the edm2 that wrote it, "
            "or a newer one"
        )
    return file, header


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """Build a denoiser from a saved model.

    Args:
        path: as in `read_model_header`.
        device: where its tensors go.

    Returns:
        The denoiser in eval mode, without gradients, and the model's `info`.

    Raises:
        ValueError: as in `read_model_header`, or if the tensors do not fit the description.
    """
    file, header = read_model_header(path)
    try:
        with torch.device("meta"):
            denoiser = Denoiser(**header["network"])
        state = safetensors.torch.load_file(file, device=str(device))
        denoiser.load_state_dict(state, assign=True)
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{file}: the tensors do not fit the network that its header describes ({' '.join(reason[:2])}): "
            "restore it from a copy"
        ) from error
    return denoiser.float().eval().requires_grad_(False), header["info"]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a model file, or a folder that holds {MODEL_FILE}")
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(f.name for f in files[:8])
        raise ValueError(f"{path} holds {len(files)} models ({names}): give the one you mean")
    raise ValueError(f"{path} holds no {MODEL_FILE}: give a model file or the folder of a finished run")
