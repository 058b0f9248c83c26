"""Guidance by an earlier moment of the same run: what to try before anything is tuned."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from edm2.ema import reconstruct_many
from edm2.ema.storage.manifest import read_manifest
from edm2.generate.generator import ImageGenerator
from edm2.generate.reconstructed import snapshots_of
from edm2.report import class_grid, save_png

SIGMA_REL = 0.1
_MOMENT, _WEIGHT = 0.4, 1.75


@dataclass(frozen=True, kw_only=True)
class OwnGuide:
    """An average of a run, and one of an earlier moment that guides it.

    Attributes:
        run: Folder of the run.
        num_images: Moment of the average, in training images.
        sigma_rel: EMA length of both.
        guide_images: Point of the guide's run, in training images; None for no guidance.
        guidance: Guidance weight.
    """

    run: Path
    num_images: float
    sigma_rel: float
    guide_images: float | None
    guidance: float

    def words(self) -> str:
        """Return the options of `edm2 sample`."""
        text = f"--ema {self.sigma_rel:g}"
        if self.guide_images is None:
            return text
        moment = f"--guide-images {self.guide_images:.0f}"
        return f"{text} --guide-ema {self.sigma_rel:g} {moment} --guidance {self.guidance:g}"

    def load(self) -> tuple[ImageGenerator, ImageGenerator | None]:
        """Return the model and its guide."""
        model = ImageGenerator.load(self.run, self.sigma_rel, num_images=self.num_images)
        if self.guide_images is None:
            return model, None
        return model, ImageGenerator.load(self.run, self.sigma_rel, num_images=self.guide_images)

    def save_grid(self, path: Path, *, num_images: int = 64, num_steps: int = 24) -> bool:
        """Write a grid of samples with these settings, from the first seeds.

        Args:
            path: The PNG file; an older one is replaced.
            num_images: Number of images, rounded so that every class has as many.
            num_steps: Noise levels of DPM-Solver++, which takes one evaluation at each.

        Returns:
            Whether there is a grid: not of models that make no pixels, or need a condition.
        """
        model, guide = self.load()
        if not model.pixel_channels or model.denoiser.cond_channels or model.takes_vectors:
            return False
        classes = max(model.num_classes, 1)
        seeds = range(classes * max(1, num_images // classes) if classes <= num_images else num_images)
        images = model.images(
            seeds, guide=guide, guidance=self.guidance, num_steps=num_steps, sampler="dpmpp-2m"
        )
        save_png(class_grid(images, model.num_classes, model.class_names), path)
        return True


def own_guide(run: str | Path, num_images: float | None = None) -> OwnGuide:
    """The guide that usually helps most without a search: the run itself, after about 40% of its training.

    Args:
        run: Folder of a run with snapshots.
        num_images: Time of the average; later snapshots are not read. Default: the last one.

    Returns:
        Settings with EMA length 0.1, or the nearest tracked one if the snapshots do not give that; without a guide if
        there is no snapshot near 40%, or it does not give the length.

    Raises:
        ValueError: If the run has no snapshot yet.

    Ref: autoguidance, arXiv 2406.02507; docs/results/tuning.md.
    """
    folder = snapshots_of(run)
    entries = [s for s in read_manifest(folder).snapshots if num_images is None or s.t <= num_images]
    times = sorted({s.t for s in entries})
    if not times:
        raise ValueError(f"{run} has no snapshot yet")
    length = SIGMA_REL
    if not gives(folder, length, times[-1]):
        length = min((s.sigma_rel for s in entries if s.t == times[-1]), key=lambda s: abs(s - SIGMA_REL))
    moment = min(times, key=lambda t: abs(t - _MOMENT * times[-1]))
    guides = 0.2 <= moment / times[-1] <= 0.7 and gives(folder, length, moment)
    return OwnGuide(
        run=Path(run),
        num_images=times[-1],
        sigma_rel=length,
        guide_images=moment if guides else None,
        guidance=_WEIGHT if guides else 1.0,
    )


def gives(folder: Path, sigma_rel: float, t: float) -> bool:
    """Whether a folder's snapshots can give an EMA length at a moment; reads no weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reconstruct_many(folder, [sigma_rel], t, warn_above=math.inf, read=False)
    except ValueError:
        return False
    return True
