"""Numbers measured of a model, each with its provenance."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edm2.evaluation.results import read_result
from edm2.files import Range, from_json
from edm2.generate import ImageGenerator
from edm2.tuning.result import BASELINE_SIGMA_REL, Tuned

# Names in a result of `edm2 metrics` -> names in a card.
_NAMES = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "Kernel distance",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number and its provenance.

    Attributes:
        metric: Its name.
        value: Its value.
        provenance: How it was measured: names and words.
        digest: Digest of the model whose images were measured; None if that is not known.
    """

    metric: str
    value: Annotated[float, Range(low=-1e100, high=1e100)]
    provenance: dict[str, str]
    digest: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(
                f"result {self.metric!r} has value {self.value!r}, which must be a finite number"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def check_results(results: Sequence[Result], generator: ImageGenerator) -> None:
    """Raise ValueError unless results are about this model's images."""
    digests = {result.digest for result in results} - {None}
    own = generator.identity()["digest"] if digests else None
    for digest in digests:
        if digest != own:
            raise ValueError(
                f"a result is about images of model {digest}, and this is model {own}: measure this model's images"
            )


def read_results(path: str | Path) -> list[Result]:
    """Numbers that `edm2 metrics score` wrote about samples of a model.

    Raises:
        ValueError: If it is another file, or does not say which model made the images.
    """
    content = read_result(Path(path))
    try:
        return _results(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy, or measure again") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _results(content: dict[str, Any]) -> list[Result]:
    images, extractor, reference = content["images"], content["extractor"], content["reference"]["images"]
    sampling = images.get("sampling") or {}
    digest = sampling.get("model", {}).get("digest")
    if digest is None:
        raise ValueError(
            "does not say which model made the images: measure a folder that `edm2 sample` wrote"
        )
    weights = (extractor.get("sha256") or "weights not known")[:16]
    provenance = {
        "extractor": f"{extractor['name']} ({weights}), {extractor['num_features']} features",
        "images": f"{images['num_images']:,}, seeds {images.get('seeds')}",
        "reference": f"{reference['source']}, {_count(reference.get('num_images'))}",
        "reference's hash": str(content["reference"].get("sha256") or reference.get("fingerprint"))[:16],
        "sampled with": _settings(sampling),
        "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    }
    if content["warnings"]:
        provenance["to be read with care"] = "; ".join(content["warnings"])
    scores = content["scores"]
    return [
        Result(metric=name, value=scores[key], provenance=provenance, digest=digest)
        for key, name in _NAMES.items()
        if scores.get(key) is not None
    ]


def tuning_results(tuned: Tuned) -> list[Result]:
    """Held-out scores that `edm2 tune` measured: tuned, and untuned for comparison."""
    common = {
        "extractor": tuned.features,
        "reference": "the run's training images",
        "sampled with": f"{tuned.sampler}, {tuned.num_steps} steps",
    }
    rows = []
    untuned = f"{tuned.metric}, untuned (EMA {BASELINE_SIGMA_REL:g}, no guidance)"
    for name, values in ((tuned.metric, tuned.held_out), (untuned, tuned.baseline)):
        images = (
            f"{len(values)} sets with seeds held out from the search: {min(values):.4g} to {max(values):.4g}"
        )
        rows.append(
            Result(metric=name, value=statistics.fmean(values), provenance={**common, "images": images})
        )
    return rows


def published_result(content: dict[str, Any]) -> Result:
    """The score that the authors of released weights report, from the settings that `edm2 import` wrote."""
    reported = content["reported"]
    provenance = {"reported": f"by the authors, as {content['preset']}; not measured with these files"}
    return from_json(
        Result, {"metric": reported["metric"], "value": reported["value"], "provenance": provenance}
    )


def _count(number: int | None) -> str:
    return "number of images not known" if number is None else f"{number:,} images"


def _settings(sampling: dict[str, Any]) -> str:
    sampler = sampling.get("sampler", {})
    text = f"{sampler.get('name')}, {sampler.get('num_steps')} steps"
    if sampling.get("guide"):
        text += f", guidance {sampler.get('guidance'):g}"
    if sampler.get("interval"):
        low, high = sampler["interval"]
        text += f" for sigma in ({low:g}, {high:g}]"
    return text
