"""A model ready to be shared: networks, sampling settings and what was measured, as one folder without a pickle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edm2
from edm2.diffusion import MODEL_FILE, find_sampler, save_model
from edm2.diffusion.description import read_json
from edm2.files import write_atomic, write_json
from edm2.generate import ImageGenerator
from edm2.hub.results import Result, check_results, published_result, read_results, tuning_results
from edm2.interop.licence import LICENCE, NOTICE, NOTICE_FILE
from edm2.interop.released import SAMPLING_PRESETS
from edm2.tuning.result import FOLDER as TUNING_FOLDER
from edm2.tuning.result import read_tuned

GUIDE_FILE, CONFIG_FILE, CARD_FILE = "guide.safetensors", "config.json", "README.md"
FILES = (MODEL_FILE, GUIDE_FILE, CONFIG_FILE, CARD_FILE, NOTICE_FILE)
_FORMAT = "edm2.pretrained/1"
_PUBLISHED_FORMAT = "edm2.sampling/1"
_MOST_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model is sampled where nothing else is asked for.

    Attributes:
        sampler: name in `edm2.diffusion.SAMPLERS`.
        num_steps: noise levels.
        guidance: weight; 1 for none.
        interval: noise levels (low, high] where guidance acts; None: everywhere.

    Raises:
        ValueError: for values that cannot be.
    """

    sampler: str = "heun"
    num_steps: int = 32
    guidance: float = 1.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        find_sampler(self.sampler)
        if type(self.num_steps) is not int or not 1 <= self.num_steps <= _MOST_STEPS:
            raise ValueError(f"num_steps {self.num_steps} must be a number from 1 to {_MOST_STEPS}")
        if type(self.guidance) not in (int, float) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance!r} must be finite")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval {self.interval} of guidance: 0 <= low < high must hold")

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an interval without an upper end has null there."""
        low, high = self.interval or (0.0, math.inf)
        interval = None if self.interval is None else [low, None if high == math.inf else high]
        return {**vars(self), "interval": interval}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sampling":
        """What `to_json` gave."""
        given = dict(content)
        if given.get("interval") is not None:
            low, high = given["interval"]
            given["interval"] = (float(low), math.inf if high is None else float(high))
        return cls(**given)


class Pretrained:
    """A generator with its guide, its sampling settings, and what was measured of it.

    Args:
        generator: the model.
        guide: what it is guided with.
        sampling: settings of `images`.
        results: measurements, for the model card.
        license: identifier as the hub lists them, such as `apache-2.0`; default: that of the weights, where
            they carry one.

    Raises:
        ValueError: for a guide that does not fit, guidance without one, results of another model, or a licence
            other than that which the weights carry.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        *,
        guide: ImageGenerator | None = None,
        sampling: Sampling | None = None,
        results: Sequence[Result] = (),
        license: str | None = None,
    ) -> None:
        self.generator, self.guide = generator, guide
        self.sampling = Sampling() if sampling is None else sampling
        if guide is not None:
            generator.check_guide(guide)
        if (self.sampling.guidance != 1) != (guide is not None):
            raise ValueError(
                f"guidance {self.sampling.guidance:g} {'without' if guide is None else 'with'} a guide: a guide goes "
                "with a weight other than 1"
            )
        check_results(results, generator)
        self.results = tuple(results)
        carried = self.carried_license
        if carried is not None and license not in (None, carried):
            raise ValueError(
                f"the weights are under {carried}, which cannot be changed to {license}: leave it out"
            )
        self.license = carried or license

    @property
    def carried_license(self) -> str | None:
        """Licence that came with the weights of the model or its guide."""
        return self._carried("license")

    @property
    def license_notice(self) -> str | None:
        """What the weights of the model or its guide say about their licence, in words."""
        return self._carried("license_notice")

    def images(
        self, seeds: Sequence[int], labels: Sequence[int] | np.ndarray | None = None, **options: Any
    ) -> np.ndarray:
        """Sample as `ImageGenerator.images` does, with the model's own settings for all that is not given."""
        settings: dict[str, Any] = {"sampler": self.sampling.sampler, "num_steps": self.sampling.num_steps}
        if self.guide is not None and options.get("guidance", self.sampling.guidance) != 1:
            settings |= {"guide": self.guide, "guidance": self.sampling.guidance}
            if self.sampling.interval is not None:
                settings["interval"] = self.sampling.interval
        return self.generator.images(seeds, labels, **{**settings, **options})

    def _carried(self, key: str) -> str | None:
        infos = [part.info for part in (self.generator, self.guide) if part is not None]
        return next((str(info[key]) for info in infos if info.get(key)), None)


def open_pretrained(
    path: str | Path,
    sigma_rel: float | None = None,
    *,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    **options: Any,
) -> Pretrained:
    """Open whatever edm2 keeps models in.

    Args:
        path: a folder that `write_pretrained` made; a run, with what `edm2 tune` found where it was tuned; a model
            file; or the settings of a released model, `NAME.json`, that `edm2 import` wrote, or their folder.
        sigma_rel: EMA length to put together from a run's snapshots instead.
        results: files that `edm2 metrics score` wrote about this model's images.
        license: as in `Pretrained`.
        **options: device, dtype, compile, see `ImageGenerator.load`.

    Raises:
        ValueError: as in `ImageGenerator.load`, `read_results` and `Pretrained`.
    """
    path = Path(path)
    measured = [result for file in results for result in read_results(file)]
    if sigma_rel is not None:
        return Pretrained(ImageGenerator.load(path, sigma_rel, **options), results=measured, license=license)
    found = find_parts(path) or _tuned_parts(path) or Parts(model=path)
    return Pretrained(
        ImageGenerator.load(found.model, **options),
        guide=None if found.guide is None else ImageGenerator.load(found.guide, **options),
        sampling=found.sampling,
        results=[*found.results, *measured],
        license=license or found.license,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the networks of a `Pretrained` lie, and the rest of it.

    Attributes:
        model: the network's file.
        guide: the guide's file.
        sampling: as in `Pretrained`.
        results: as in `Pretrained`.
        license: as in `Pretrained`.
    """

    model: Path
    guide: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    results: tuple[Result, ...] = ()
    license: str | None = None


def find_parts(path: str | Path) -> Parts | None:
    """What a folder of `write_pretrained`, or the settings of a released model, consist of; None for other paths.

    A folder that holds the settings of one released model stands for them.

    Raises:
        ValueError: if the settings are damaged, or a folder holds those of several.
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
            f"{path} holds no settings of a released model: give a file that `edm2 import` wrote"
        )
    try:
        return reader(file.parent, content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): restore it from a copy, or download it again"
        ) from error


def write_pretrained(model: Pretrained, folder: str | Path) -> Path:
    """Write networks, settings and licence notice; the card is `edm2.hub.model_card.model_card`'s.

    Returns:
        The folder.

    Raises:
        FileExistsError: if it holds a model already.
    """
    folder = check_free(folder)
    for name, part in ((MODEL_FILE, model.generator), (GUIDE_FILE, model.guide)):
        if part is not None:
            tensors = {key: _stored(tensor) for key, tensor in part.denoiser.state_dict().items()}
            save_model(folder / name, part.denoiser.config, tensors, part.info)
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
    """The folder; raises FileExistsError if it holds anything that would be overwritten."""
    folder = Path(folder)
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)} already: choose another folder or move them away"
        )
    return folder


def _shared_parts(folder: Path, content: dict[str, Any]) -> Parts:
    if not isinstance(content["license"], (str, type(None))) or not isinstance(content["guide"], bool):
        raise ValueError("license and guide must be a text and true or false")
    return Parts(
        model=folder / MODEL_FILE,
        guide=folder / GUIDE_FILE if content["guide"] else None,
        sampling=Sampling.from_json(content["sampling"]),
        results=tuple(Result.from_json(result) for result in content["results"]),
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
    """A name in settings from elsewhere: of a file beside them, never of one somewhere else."""
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"{str(name)[:60]!r} is no name of a .safetensors file beside it")
    return name


def _tuned_parts(path: Path) -> Parts | None:
    tuned = read_tuned(path) if path.is_dir() else None
    if tuned is None:
        return None
    knobs, folder = tuned.best, path / TUNING_FOLDER
    sampling = Sampling(
        sampler=tuned.sampler,
        num_steps=tuned.num_steps,
        guidance=knobs.guidance,
        interval=None if knobs.interval == (0.0, math.inf) else knobs.interval,
    )
    guide = folder / GUIDE_FILE if knobs.is_guided else None
    return Parts(
        model=folder / MODEL_FILE, guide=guide, sampling=sampling, results=tuple(tuning_results(tuned))
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path.read_bytes())
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
