"""One setting of the studio, and the `edm2 sample` command that makes the same images."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edm2.diffusion import SamplerName

GuideKind = Literal["none", "without labels", "earlier", "other"]
EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the images of one side of the page depend on.

    Attributes:
        sigma_rel: EMA length.
        num_images: Time of the average, in training images.
        guide: No guide; the model itself without labels; an earlier moment of the run; or another model.
        guide_sigma_rel: EMA length of an earlier moment.
        guide_images: Time of an earlier moment.
        guidance: Guidance weight.
        interval: Noise levels (low, high] at which guidance acts.
        sampler: Name in `edm2.diffusion.SAMPLERS`.
        num_steps: Noise levels.
        first_seed: Seed of the first image.
        count: Number of images.
        label: Class of all images; None: seed modulo the number of classes, or that of the case.
        case: For a conditional run, the case of its data whose condition all images are given.
        dropped: Name of a picture that replaces the case's condition; see `Cases.drop`.
    """

    sigma_rel: float
    num_images: float
    guide: GuideKind = "none"
    guide_sigma_rel: float = 0.1
    guide_images: float = 0
    guidance: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    sampler: SamplerName = "dpmpp-2m"
    num_steps: int = 16
    first_seed: int = 0
    count: int = 16
    label: int | None = None
    case: int = 0
    dropped: str | None = None

    @property
    def is_guided(self) -> bool:
        """Whether a guide takes part; weight 1 is none."""
        return self.guide != "none" and self.guidance != 1

    @property
    def seeds(self) -> range:
        """Seed of each image."""
        return range(self.first_seed, self.first_seed + self.count)

    def options(self) -> dict[str, Any]:
        """Fields of `edm2.generate.SamplerOptions`."""
        chosen: dict[str, Any] = {"sampler": self.sampler, "num_steps": self.num_steps}
        if self.is_guided:
            chosen |= {"guidance": self.guidance, "interval": self.interval}
        return chosen

    def command(
        self,
        run: Path,
        other: Path | None = None,
        *,
        given: Path | None = None,
        vae: str | None = None,
        out: str = "samples",
    ) -> str:
        """The command that makes the same images, bit for bit.

        Args:
            run: Folder of the run.
            other: The other model that guides.
            given: File of the conditions, for a conditional run.
            vae: Autoencoder of a latent model, where it is not the usual one.
            out: Its folder for the images.
        """
        words = [
            "edm2",
            "sample",
            str(run),
            "--ema",
            number(self.sigma_rel),
            "--ema-images",
            number(self.num_images),
        ]
        if self.is_guided:
            if self.guide == "earlier":
                words += [
                    "--guide-ema",
                    number(self.guide_sigma_rel),
                    "--guide-images",
                    number(self.guide_images),
                ]
            elif self.guide == "other":
                words += ["--guide", str(other)]
            else:
                words += ["--guide", "self"]
            words += ["--guidance", number(self.guidance)]
            if self.interval != EVERYWHERE:
                words += ["--interval", *map(number, self.interval)]
        words += ["--sampler", self.sampler, "--num-steps", str(self.num_steps)]
        words += ["--seeds", f"{self.seeds[0]}-{self.seeds[-1]}" if self.count > 1 else str(self.first_seed)]
        if self.label is not None:
            words += ["--label", str(self.label)]
        words += [] if given is None else ["--conditions", str(given)]
        words += [] if vae is None else ["--vae", vae]
        return shlex.join([*words, "--out", out])


def number(value: float) -> str:
    """A number as text that gives the same number again."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
