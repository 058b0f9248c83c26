"""Models in folders: opened from whatever edm2 keeps models in, and written in the form that the hub keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import edm2
from edm2.diffusion import MODEL_FILE, save_model
from edm2.files import from_json, read_json, write_atomic, write_json
from edm2.generate import ImageGenerator
from edm2.hub.model_card import model_card
from edm2.hub.pretrained import Pretrained, Sampling
from edm2.hub.results import Result, published_result, read_results, tuning_results
from edm2.interop.licence import LICENCE, NOTICE, NOTICE_FILE
from edm2.interop.released import SAMPLING_PRESETS
from edm2.train.residual import MEAN_FILE, copy_regression
from edm2.tuning.result import FOLDER as TUNING_FOLDER
from edm2.tuning.result import read_tuned

GUIDE_FILE, CONFIG_FILE, CARD_FILE = "guide.safetensors", "config.json", "README.md"
FILES = (MODEL_FILE, GUIDE_FILE, MEAN_FILE, CONFIG_FILE, CARD_FILE, NOTICE_FILE)
_FORMAT = "edm2.pretrained/1"
_PUBLISHED_FORMAT = "edm2.sampling/1"


def save_pretrained(
    model: str | Path | ImageGenerator | Pretrained,
    folder: str | Path,
    *,
    sigma_rel: float | None = None,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a model as a folder of safetensors, settings and a card, ready to be uploaded.

    Args:
        model: A run (with the settings that `edm2 tune` found, if it was tuned); a model file; the settings of a
            released model that `edm2 import` wrote; or a model in memory.
        folder: Folder to write.
        sigma_rel: EMA length to reconstruct from a run's snapshots instead.
        results: Files that `edm2 metrics score` wrote about this model's images, for the card.
        license: Identifier as the hub lists them, such as `apache-2.0`. Weights that carry a licence keep it.
        repo_id: `owner/name` for the example in the card; default: the folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it holds a model already.
        ValueError: As in `open_pretrained`.
    """
    if isinstance(model, (str, Path)):
        model = open_pretrained(model, sigma_rel, results=results, license=license)
    elif sigma_rel is not None or results or (license is not None and isinstance(model, Pretrained)):
        raise ValueError(
            "sigma_rel, results and the licence are for models that are opened here: give a path, or build a Pretrained"
        )
    elif isinstance(model, ImageGenerator):
        model = Pretrained(model, license=license)
    folder = write_pretrained(model, folder)
    write_atomic(folder / CARD_FILE, model_card(model, repo_id or str(folder)).encode())
    return folder


def open_pretrained(
    path: str | Path,
    sigma_rel: float | None = None,
    *,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    **options: Any,
) -> Pretrained:
    """Open a model in any form that edm2 stores.

    Args:
        path: A folder that `write_pretrained` made; a run (with the settings that `edm2 tune` found, if it was
            tuned); a model file; or the settings of a released model that `edm2 import` wrote, `NAME.json` or its
            folder.
        sigma_rel: EMA length to reconstruct from a run's snapshots instead.
        results: Files that `edm2 metrics score` wrote about this model's images.
        license: As in `Pretrained`.
        **options: `device`, `dtype` and `compile` of `ImageGenerator.load`.

    Raises:
        ValueError: As in `ImageGenerator.load`, `read_results` and `Pretrained`.
    """
    path = Path(path)
    measured = [result for file in results for result in read_results(file)]
    if sigma_rel is not None:
        return Pretrained(ImageGenerator.load(path, sigma_rel, **options), results=measured, license=license)
    found = find_parts(path) or _tuned_parts(path)
    if found is None:
        return Pretrained(ImageGenerator.load(path, **options), results=measured, license=license)
    return Pretrained(
        ImageGenerator.load(found.model, **options),
        guide=None if found.guide is None else ImageGenerator.load(found.guide, **options),
        sampling=found.sampling,
        results=[*found.results, *measured],
        license=license or found.license,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The files of a `Pretrained`, and its settings.

    Attributes:
        model: The network's file.
        guide: The guide's file.
        sampling: As in `Pretrained`.
        results: As in `Pretrained`.
        license: As in `Pretrained`.
    """

    model: Path
    guide: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    results: tuple[Result, ...] = ()
    license: str | None = None


def find_parts(path: str | Path) -> Parts | None:
    """Find the parts of a folder of `write_pretrained`, or of the settings of a released model; None for other paths.

    A folder that holds the settings of one released model stands for them.

    Raises:
        ValueError: If the settings are damaged, or a folder holds those of several.
    """
    path = Path(path)
    published = [path / f"{name}.json" for name in SAMPLING_PRESETS if (path / f"{name}.json").is_file()]
    if len(published) > 1:
        raise ValueError(
            f"{path} holds the settings of {len(published)} released models: choose {' or '.join(map(str, published))}"
        )
    path = published[0] if published else path
    file = path if path.suffix == ".json" else path / CONFIG_FILE  # a run has one of that name, too
    if path != file and not file.is_file():
        return None
    content = _read_json(file)
    reader = {_FORMAT: _shared_parts, _PUBLISHED_FORMAT: _published_parts}.get(str(content.get("format")))
    if reader is None:
        if path != file:
            return None
        raise ValueError(
            f"{path} does not hold the settings of a released model: give a file that `edm2 import` wrote"
        )
    try:
        return reader(file.parent, content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): restore it from a copy, or download it again"
        ) from error


def write_pretrained(model: Pretrained, folder: str | Path) -> Path:
    """Write networks, settings and licence notice, but not the card, which is `edm2.hub.model_card.model_card`'s.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it holds a model already.
    """
    folder = check_free(folder)
    for name, part in ((MODEL_FILE, model.generator), (GUIDE_FILE, model.guide)):
        if part is not None:
            tensors = {key: _stored(tensor) for key, tensor in part.denoiser.state_dict().items()}
            save_model(folder / name, part.denoiser.options, tensors, part.info)
    if model.generator.residual is not None:
        copy_regression(model.generator.residual.file, folder)
    if model.carried_license == LICENCE:
        write_atomic(folder / NOTICE_FILE, NOTICE.encode())
    content = {
        "format": _FORMAT,
        "edm2": edm2.__version__,
        "license": model.license,
        "guide": model.guide is not None,
        "sampling": model.sampling.to_json(),
        "results": [result.to_json() for result in model.results],
    }
    write_json(folder / CONFIG_FILE, content)
    return folder


def check_free(folder: str | Path) -> Path:
    """Return the folder, or raise FileExistsError if it holds a file that would be overwritten."""
    folder = Path(folder)
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} already holds {', '.join(there)}: choose another folder or move them away"
        )
    return folder


def _shared_parts(folder: Path, content: dict[str, Any]) -> Parts:
    if not isinstance(content["license"], (str, type(None))) or not isinstance(content["guide"], bool):
        raise ValueError("license and guide must be a text and true or false")
    return Parts(
        model=folder / MODEL_FILE,
        guide=folder / GUIDE_FILE if content["guide"] else None,
        sampling=Sampling.from_json(content["sampling"]),
        results=tuple(from_json(Result, result) for result in content["results"]),
        license=content["license"],
    )


def _published_parts(folder: Path, content: dict[str, Any]) -> Parts:
    guide = content["guide"]
    return Parts(
        model=folder / _file_name(content["model"]),
        guide=None if guide is None else folder / _file_name(guide),
        sampling=Sampling(guidance=1.0 if guide is None else content["guidance"]),
        results=(published_result(content),),
    )


def _file_name(name: object) -> str:
    """A name in settings from elsewhere: of a file in the same folder, never of one elsewhere."""
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"{str(name)[:60]!r} is not the name of a .safetensors file in the same folder")
    return name


def _tuned_parts(path: Path) -> Parts | None:
    tuned = read_tuned(path) if path.is_dir() else None
    if tuned is None or not tuned.is_better:
        return None
    knobs, folder = tuned.best, path / TUNING_FOLDER
    sampling = Sampling(
        sampler=tuned.sampler,
        num_steps=knobs.num_steps or tuned.num_steps,
        guidance=knobs.guidance,
        interval=None if knobs.interval == (0.0, math.inf) else knobs.interval,
        levels=knobs.levels,
    )
    guide = folder / GUIDE_FILE if knobs.is_guided else None
    return Parts(
        model=folder / MODEL_FILE, guide=guide, sampling=sampling, results=tuple(tuning_results(tuned))
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError("no table")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it from a copy") from error
    return content


def _stored(tensor: Tensor) -> Tensor:
    """In float16 where that loses nothing, as for the released weights."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
