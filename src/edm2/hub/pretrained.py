"""A model with its guide, sampling settings, results and licence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from edm2.diffusion import consistency_steps, find_sampler
from edm2.files import Range, from_json
from edm2.generate import ImageGenerator
from edm2.generate.checks import check_guide
from edm2.hub.results import Result, check_results

_MOST_STEPS = 10_000
_Level = Annotated[float, Range(low=0, high=1e9, special=True)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Default sampling settings of a model.

    Attributes:
        sampler: Name in `edm2.diffusion.SAMPLERS`.
        num_steps: Noise levels.
        guidance: Guidance weight; 1 for none.
        interval: Noise levels (low, high] where guidance acts; None: everywhere.
        levels: Noise levels of a student's steps after the first; None: the standard ones.

    Raises:
        ValueError: If values are out of range.
    """

    sampler: str = "heun"
    num_steps: Annotated[int, Range(low=1, high=_MOST_STEPS)] = 32
    guidance: Annotated[float, Range(low=-1e6, high=1e6)] = 1.0
    interval: tuple[_Level, _Level] | None = None
    levels: tuple[_Level, ...] | None = None

    def __post_init__(self) -> None:
        find_sampler(self.sampler)
        if not 1 <= self.num_steps <= _MOST_STEPS:
            raise ValueError(f"num_steps {self.num_steps} must be a number from 1 to {_MOST_STEPS}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance!r} must be finite")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval {self.interval} of guidance: 0 <= low < high must hold")
        if self.levels is not None:
            consistency_steps(self.num_steps, self.levels)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an interval without an upper end has null there."""
        low, high = self.interval or (0.0, math.inf)
        interval = None if self.interval is None else [low, None if high == math.inf else high]
        told = {**vars(self), "interval": interval}
        if self.levels is None:
            del told["levels"]
        return told

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sampling":
        """Read the result of `to_json`."""
        given = dict(content)
        if given.get("interval") is not None:
            low, high = given["interval"]
            given["interval"] = (float(low), math.inf if high is None else float(high))
        if given.get("levels") is not None:
            given["levels"] = tuple(float(level) for level in given["levels"])
        return from_json(cls, given)


class Pretrained:
    """A generator with its guide, its sampling settings and its results.

    Args:
        generator: The model.
        guide: Model that guides it, if any.
        sampling: Settings of `images`.
        results: Measurements, for the model card.
        license: Identifier as the hub lists them, such as `apache-2.0`. Default: that of the weights, if
            they carry one.

    Raises:
        ValueError: If the guide does not fit, guidance lacks a guide, results are of another model, or the licence is
            not the one that the weights carry.
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
        if sampling is None:
            default = generator.sampler_options()
            sampling = Sampling(sampler=str(default.sampler), num_steps=len(default.sigmas()) - 1)
        self.sampling = sampling
        if guide is not None:
            check_guide(generator, guide)
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
        """Licence notice of the weights of the model or of its guide."""
        return self._carried("license_notice")

    def images(
        self, seeds: Sequence[int], labels: Sequence[int] | np.ndarray | None = None, **options: Any
    ) -> np.ndarray:
        """Sample as `ImageGenerator.images` does, with the model's own settings as defaults."""
        return self.generator.images(seeds, labels, **self.settings(**options))

    def settings(self, **options: Any) -> dict[str, Any]:
        """Guide and options of the sampler, as arguments of `ImageGenerator.images`: the model's own unless given."""
        settings: dict[str, Any] = {"sampler": self.sampling.sampler, "num_steps": self.sampling.num_steps}
        if self.sampling.levels is not None and {"sampler", "num_steps", "levels"}.isdisjoint(options):
            settings["levels"] = self.sampling.levels
        if self.guide is not None and options.get("guidance", self.sampling.guidance) != 1:
            settings |= {"guide": self.guide, "guidance": self.sampling.guidance}
            if self.sampling.interval is not None:
                settings["interval"] = self.sampling.interval
        return {**settings, **options}

    def _carried(self, key: str) -> str | None:
        infos = [part.info for part in (self.generator, self.guide) if part is not None]
        return next((str(info[key]) for info in infos if info.get(key)), None)
