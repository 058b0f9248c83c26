"""Saved models: one safetensors file whose header says how to build the network it holds."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edm2.diffusion.denoiser import Denoiser
from edm2.diffusion.description import build_from, check_info
from edm2.diffusion.own_network import UnregisteredNetworkError
from edm2.ema.storage.tensorfile import TensorSpec, file_order, write_tensors
from edm2.files import check_seal, read_json, sealed
from edm2.progress import clean

MODEL_FILE = "model.safetensors"
_KIND, _VERSION = "edm2.model", "1"
_KEY = "edm2"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_model(
    path: str | Path,
    options: dict[str, Any],
    tensors: dict[str, Tensor],
    info: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model as one self-describing safetensors file.

    Args:
        path: The file, or a folder, where it becomes `model.safetensors`.
        options: Arguments that build the denoiser, `Denoiser.options`.
        tensors: Its state, by name.
        info: What else a user of the model needs, as JSON values: pixel coding, class names, EMA length.
        overwrite: Whether to replace an existing file.

    Returns:
        The file written.

    Raises:
        FileExistsError: If the file exists.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / MODEL_FILE
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name or move it away")
    specs = [TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in tensors.items()]
    write_model(path, options, specs, (tensors[n].detach().cpu() for n in reading_order(specs)), info)
    return path


def reading_order(specs: Sequence[TensorSpec]) -> list[str]:
    """Names in the order in which `write_model` takes the tensors: twice, for the checksum and for the file."""
    return [*sorted(spec.name for spec in specs), *(spec.name for spec in file_order(specs))]


def write_model(
    path: Path,
    options: dict[str, Any],
    specs: Sequence[TensorSpec],
    tensors: Iterator[Tensor],
    info: dict[str, Any] | None = None,
) -> None:
    """Write a model tensor by tensor, in place of an existing file.

    Args:
        path: The file.
        options: See `save_model`, as for `info`.
        specs: Names, types and shapes of the state.
        tensors: The state on the CPU, in `reading_order`.
        info: See `save_model`.
    """
    names = reading_order(specs)[: len(specs)]
    description = {
        "format": f"{_KIND}/{_VERSION}",
        "network": options,
        "info": info or {},
        "tensors_sha256": _digest(zip(names, tensors, strict=False)),  # leaves the second half
    }
    header = json.dumps(sealed(description), sort_keys=True)
    write_tensors(path, specs, lambda _: next(tensors), {_KEY: header})


def read_model_header(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Find a model's file and read its description without its tensors.

    Args:
        path: A model file, or a folder that holds `model.safetensors` or just one .safetensors file.

    Returns:
        The file, and a dict with `network` and `info`.

    Raises:
        ValueError: If there is no such file, it is damaged, or it is not an edm2 model. Whether the network can be
            built is checked by `read_model`.
    """
    file = _find(Path(path))
    if file.suffix == ".pkl":
        raise ValueError(
            f"{file} is a pickle, which is not opened here: convert it to a model file with `edm2 import`"
        )
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({error}): restore it from a copy"
        ) from error
    try:
        header = read_json(metadata[_KEY], finite=False)
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
    try:
        check_seal(header)
    except ValueError:
        raise ValueError(
            f"{file} is damaged: its description is not the one that was written; restore it from a copy"
        ) from None
    try:
        check_info(header["info"])
    except ValueError as error:
        raise _damaged(file, error) from error
    return file, header


def read_model(path: str | Path) -> tuple[Path, Denoiser, dict[str, Any]]:
    """Check all of a saved model but the values of its tensors.

    Args:
        path: See `read_model_header`.

    Returns:
        The file; its network on the meta device, in eval mode; and the model's `info`.

    Raises:
        ValueError: As in `read_model_header`, or if the tensors do not fit the description.
    """
    file, header = read_model_header(path)
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            names = content.keys()
            denoiser = build_from(header["network"], num_tensors=len(names))
            denoiser.load_state_dict({name: _without_values(content, name) for name in names}, assign=True)
    except UnregisteredNetworkError as error:
        raise ValueError(f"{file}: {error}") from None
    except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise _damaged(file, error) from error
    return file, denoiser, header["info"]


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """Build a denoiser from a saved model.

    Args:
        path: See `read_model_header`.
        device: Device of its tensors.

    Returns:
        The denoiser in eval mode, without gradients, and the model's `info`.

    Raises:
        ValueError: As in `read_model`, or if weights are not finite.
    """
    file, denoiser, info = read_model(path)
    state = safetensors.torch.load_file(file, device=str(device))
    known = read_model_header(file)[1].get("tensors_sha256")
    if known is not None and _digest(sorted(state.items())) != known:
        raise ValueError(
            f"{file} is damaged: its tensors are not those that were written; restore it from a copy"
        )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{file}: {name} has values that are not finite: the training diverged, or the file is damaged"
            )
    denoiser.load_state_dict(state, assign=True)
    return denoiser.to(device).float().requires_grad_(False), info


def model_checksum(path: str | Path) -> str:
    """The sha256 of a saved model's tensors, whatever else its file says; arguments and errors as `load_model`."""
    file, header = read_model_header(path)
    known: str | None = header.get("tensors_sha256")
    return _digest(sorted(safetensors.torch.load_file(file).items())) if known is None else known


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Checksum of tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_values(content: Any, name: str) -> Tensor:
    """A tensor as the file's header describes it; only the byte that names a configuration is read."""
    header = content.get_slice(name)
    if header.get_dtype() in _FLOATS:
        return torch.empty(header.get_shape(), dtype=_FLOATS[header.get_dtype()], device="meta")
    if header.get_dtype() != "U8" or header.get_shape() != []:
        raise ValueError(f"{name} of type {header.get_dtype()}, but weights must be floats")
    tensor: Tensor = content.get_tensor(name)
    return tensor


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    # Names from the file may hold characters that a terminal would obey.
    plain = clean(reason[:400], keep="")
    return ValueError(
        f"{file}: the tensors do not fit the network that its header describes ({plain}): restore it from a copy"
    )


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
    raise ValueError(f"{path} has no {MODEL_FILE}: give a model file or the folder of a finished run")
