"""Options that `edm2 sample` and `edm2 forecast` share: which model, guide and sampler."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro

from edm2.diffusion import SamplerName
from edm2.generate import ImageGenerator, SamplerOptions, parse_seeds
from edm2.hub import Parts, find_parts
from edm2.progress import tell
from edm2.tuning.plan import SELF
from edm2.tuning.result import tuned_settings

_OPTIONS = [field.name for field in dataclasses.fields(SamplerOptions)]
_Chosen = TypeVar("_Chosen", bound="Sampling")


@dataclass(kw_only=True)
class Sampling:
    """Model, guide and sampler, as options of a command."""

    source: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run, model file, folder of `save_pretrained`, or NAME.json of `edm2 import`."""
    model: Path | None = None
    """The same as the positional argument."""
    ema: float | None = None
    """EMA length to reconstruct from the run's snapshots. Default: the run's final model."""
    ema_images: float | None = None
    """Time at which this average ends, in training images. Default: the last snapshot."""
    guide: Path | None = None
    """Guide: an unconditional or weaker model, or self for the model without labels (needs --label-dropout in
    training). The EMA length of self is the model's unless --guide-ema is given."""
    guide_ema: float | None = None
    """EMA length of the guide, reconstructed from the snapshots of --guide, or of the run itself. Needs --guidance."""
    guide_images: float | None = None
    """Time of the guide in training images, to use an earlier point of its run. Default: the last snapshot."""
    guidance: float | None = None
    """Guidance weight; 1 for none. Default: the saved or tuned weight, or else 1."""
    interval: tuple[float, float] | None = None
    """Lowest and highest noise level at which guidance acts. Default: all."""
    sampler: SamplerName | None = None
    """heun runs the network twice at each noise level but the last, the others once. dpmpp-2m-sde adds noise.
    consistency is for students. Default: the sampler that the run was tuned with, or else consistency for students
    and dpmpp-3m for other models."""
    num_steps: int | None = None
    """Number of noise levels. Default: the number that the run was tuned with, or else 2 for a student, 24 for
    dpmpp-3m, and 32 for other samplers."""
    levels: tuple[float, ...] | None = None
    """Noise levels of a student's steps after the first. Default: the tuned ones, or a standard choice."""
    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float | None = None
    """Highest noise level. Default: the one that the run was tuned or trained with, else 80."""
    rho: float | None = None
    """Exponent of the schedule. Default: 10 for dpmpp-3m, 7 for the others."""
    s_churn: float = 0.0
    """Strength of the noise that the sampler heun adds; 0 is deterministic."""
    s_min: float = 0.0
    """Lowest noise level at which --s-churn adds noise."""
    s_max: float = math.inf
    """Highest noise level at which --s-churn adds noise."""
    s_noise: float = 1.0
    """Scale of the noise that heun (with --s-churn) and dpmpp-2m-sde add."""
    clip_denoised: bool = False
    """Clamp the denoised images of every step to the range of pixels."""
    batch: int = 250
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    compile: bool = False
    """Use torch.compile, which takes minutes to start and pays off for many images."""


def chosen_path(chosen: Sampling) -> Path:
    """The model or run that was given, as first word or as option.

    Raises:
        ValueError: If neither or both are given.
    """
    if (chosen.source is None) == (chosen.model is None):
        raise ValueError("which model? Give one run or model file, either directly or with --model")
    path = chosen.source or chosen.model
    assert path is not None
    return path


def chosen_cases(words: str, count: int, source: str | Path) -> np.ndarray:
    """The cases that an option names, such as 0-9 or 0,5,7.

    Raises:
        ValueError: If the source has fewer.
    """
    rows = np.array(parse_seeds(words))
    if rows.max() >= count:
        raise ValueError(f"--cases {words}: {source} holds {count} cases, numbered from 0")
    return rows


def sampler_options(chosen: Sampling) -> dict[str, Any]:
    """The options that are fields of `SamplerOptions`."""
    return {name: getattr(chosen, name) for name in _OPTIONS if getattr(chosen, name) is not None}


def with_saved(chosen: _Chosen, path: Path) -> tuple[_Chosen, Path]:
    """Fill in saved or tuned settings where the user chose none of them; returns the model's path, too."""
    names = ("ema", "ema_images", "guide", "guide_ema", "guide_images", "guidance", "interval")
    free = all(getattr(chosen, name) is None for name in names)
    parts = find_parts(path)
    if parts is None:
        saved = _tuned_settings(path) if free and path.is_dir() else {}
    else:
        saved, path = _shared_settings(parts) if free else {}, parts.model
    own = {"num_steps": chosen.num_steps, "sampler": chosen.sampler, "levels": chosen.levels}
    own = {name: value for name, value in own.items() if value is not None}
    if any(saved.get(name) != value for name, value in own.items()):
        saved.pop("levels", None)  # they are those of the saved steps
    guidance = 1.0 if chosen.guidance is None else chosen.guidance
    changes: dict[str, Any] = {"guidance": guidance, **saved, **own}
    for name in ("s_churn", "sigma_min", "sigma_max", "rho"):
        if getattr(chosen, name) != getattr(Sampling, name):
            changes.pop(name, None)
    if changes.get("sampler", "heun") != "heun":
        changes.pop("s_churn", None)
    return dataclasses.replace(chosen, **changes), path


def _shared_settings(parts: Parts) -> dict[str, Any]:
    saved = parts.sampling
    settings: dict[str, Any] = dict(num_steps=saved.num_steps, sampler=saved.sampler, levels=saved.levels)
    told = "no guidance"
    if parts.guide is not None:
        settings |= dict(guide=parts.guide, guidance=saved.guidance, interval=saved.interval)
        told = f"guidance {saved.guidance:g} by {parts.guide.name}"
    tell(f"edm2: using saved settings: {told}; to choose your own, sample {parts.model}")
    return settings


def _tuned_settings(run: Path) -> dict[str, Any]:
    settings, remarks = tuned_settings(run)
    for remark in remarks:
        tell(f"edm2: {remark}")
    return settings


def open_guide(
    chosen: Sampling, path: Path, common: dict[str, Any], model: ImageGenerator | None = None
) -> ImageGenerator | None:
    """Open the guide that the options ask for; None for none.

    Args:
        chosen: The options.
        path: Model or run that is sampled.
        model: The same, opened; needed where it may guide itself.
        common: Arguments of `ImageGenerator.load` that both share.

    Raises:
        ValueError: If options contradict each other, or the guide cannot be opened.
    """
    wanted = chosen.guide is not None or chosen.guide_ema is not None
    if chosen.guide_images is not None and chosen.guide_ema is None:
        raise ValueError(f"--guide-images {chosen.guide_images:g} needs --guide-ema, the guide's EMA length")
    if wanted and chosen.guidance == 1:
        raise ValueError(
            "a guide has no effect with --guidance 1: give another weight, or leave the guide out"
        )
    if chosen.interval is not None and chosen.guidance == 1:
        raise ValueError("--interval has no effect with --guidance 1: give a weight and a guide")
    if not wanted:
        if chosen.guidance != 1:
            raise ValueError(
                f"--guidance {chosen.guidance:g} needs a guide: give a model as --guide, or use an earlier point of "
                "the run with --guide-ema and --guide-images; --guidance 1 turns guidance off"
            )
        return None
    if chosen.guide == SELF and chosen.guide_ema is None and model is not None:
        return model.without_labels()
    source = path if chosen.guide in (None, SELF) else chosen.guide
    found = ImageGenerator.load(source, chosen.guide_ema, num_images=chosen.guide_images, **common)
    return found.without_labels() if chosen.guide == SELF else found
