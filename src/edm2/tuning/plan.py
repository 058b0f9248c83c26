"""How far a search goes: which values of each knob it tries, and with how many images."""

import math
from dataclasses import dataclass
from pathlib import Path

from edm2.diffusion import SamplerName, find_sampler, time_steps
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.ema.storage.manifest import read_manifest
from edm2.generate import snapshots_of
from edm2.generate.sampler_options import STUDENT_SAMPLER
from edm2.train.run_folder import SNAPSHOTS

SELF = Path("self")  # as a guide: the network itself without labels
# Seeds of samples; the search never sees those of the final measurement.
SEARCH_SEED, HELD_OUT_SEED = 3_000_000, 4_000_000


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """How far the search goes.

    Attributes:
        num_images: Point of the run to tune, in training images; the last snapshot up to it is used. Default: the
            newest snapshot when the search starts.
        sigma_rels: EMA lengths to try, ascending.
        guide_moments: Points of the run to try as guide, as fractions of its length; the nearest snapshots are used.
        guide_factors: EMA lengths of the guide, in units of the best length.
        guide: Further guide to try: the file of an unconditional or weaker model, a run of one, or `self` for the
            run's own network without labels.
        guidances: Guidance weights to try.
        highs: Upper ends of the interval to try.
        lows: Lower ends of the interval to try.
        level_factors: For a student: factors on the noise levels of its steps, first of all of them, then of each.
        steps: Numbers of noise levels to try; more levels are slower and change the spread of an ensemble.
        churns: Strengths of added noise to try, for the sampler heun.
        samples: Images for each choice.
        final_samples: Images for each final measurement.
        repeats: Final measurements, each with its own seeds; at least 2, for a confidence interval.
        num_steps: Noise levels of the sampler.
        sampler: heun runs the network twice at each noise level but the last, the others once; consistency is for
            students.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        rho: Exponent of the schedule. Default: 10 for `dpmpp-3m`, 7 for the others.

    Raises:
        ValueError: If a value is out of range.
    """

    num_images: float | None = None
    sigma_rels: tuple[float, ...] = (0.03, 0.05, 0.07, 0.09, 0.11, 0.14, 0.18, 0.25)
    guide_moments: tuple[float, ...] = (0.08, 0.16, 0.32, 0.6)
    guide_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    guide: Path | None = None
    guidances: tuple[float, ...] = (1.2, 1.35, 1.75, 2.0, 2.5)
    highs: tuple[float, ...] = (8.0, 3.0, 1.2)
    lows: tuple[float, ...] = (0.05, 0.2, 0.5)
    level_factors: tuple[float, ...] = (0.4, 0.6, 0.8, 1.25, 1.6, 2.5)
    steps: tuple[int, ...] = ()
    churns: tuple[float, ...] = ()
    samples: int = 1000
    final_samples: int = 1000
    repeats: int = 3
    num_steps: int = 16
    sampler: SamplerName = "heun"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("final_samples", 2), ("repeats", 2), ("num_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        most = HELD_OUT_SEED - SEARCH_SEED
        if self.samples > most:
            raise ValueError(f"samples {self.samples} would reach the held-out seeds: give at most {most}")
        if not self.sigma_rels:
            raise ValueError("sigma_rels is empty: give at least one EMA length")
        sigma_rel_to_gamma(self.sigma_rels)
        if list(self.sigma_rels) != sorted(set(self.sigma_rels)):
            raise ValueError(f"sigma_rels {self.sigma_rels} must ascend, each length once")
        if any(not 0 < moment < 1 for moment in self.guide_moments):
            raise ValueError(
                f"guide_moments {self.guide_moments} must lie between 0 and 1, as fractions of the run"
            )
        for name in (
            "guide_moments", "guide_factors", "guidances", "highs", "lows", "level_factors", "steps", "churns",
        ):  # fmt: skip
            values = getattr(self, name)
            if any(not 0 < value < math.inf for value in values):
                raise ValueError(f"{name} {values} must be positive and finite")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} must be different values")
        highest, lowest, _ = time_steps(
            2, self.sigma_min, self.sigma_max, 7.0 if self.rho is None else self.rho
        ).tolist()
        if any(high < lowest for high in self.highs) or any(low >= highest for low in self.lows):
            raise ValueError(
                f"highs {self.highs} and lows {self.lows} must be ends of intervals that hold some of the sampler's "
                f"noise levels, {lowest:g} to {highest:g}"
            )
        find_sampler(self.sampler)
        if self.churns and self.sampler != "heun":
            raise ValueError(
                f"churns {self.churns} are for the sampler heun, not for {self.sampler}: choose heun, or leave them out"
            )

    @property
    def range(self) -> dict[str, float]:
        """Ends and exponent of the schedule, where they are not the usual ones, as options of a sampler."""
        given = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}
        return {
            name: value for name, value in given.items() if value not in (None, getattr(TuningPlan, name))
        }

    @classmethod
    def for_run(cls, run: Path) -> "TuningPlan":
        """The default plan for a run, from its highest noise level; for a student's, two steps and their noise levels.

        Raises:
            ValueError: If the run has no snapshots, or is a regression.
        """
        info = (read_manifest(snapshots_of(run)).run.metadata or {}).get("info", {})
        if info.get("objective") == "mean":
            raise ValueError(
                f"{run} is a regression, which has no samples to tune: train the diffusion of its residuals with "
                f"--residual {run}, and tune that"
            )
        if "consistency" in info:
            first = info["consistency"]["sigma_max"]
            return cls(num_steps=2, sampler=STUDENT_SAMPLER, sigma_max=first)
        return cls(sigma_max=info.get("sigma_max", cls.sigma_max))

    @property
    def is_for_student(self) -> bool:
        """Whether noise levels are searched, instead of a guide."""
        return self.sampler == STUDENT_SAMPLER

    @property
    def most_evaluations(self) -> int:
        """Largest number of settings that the search tries; each takes one set of images."""
        if self.is_for_student:
            levels = self.num_steps - 1
            return 2 * len(self.sigma_rels) + len(self.level_factors) * (levels + (levels > 1))
        guides = len(self.guide_moments) * len(self.guide_factors)
        if self.guide is not None:
            own = self.guide == SELF or has_snapshots(self.guide)
            guides += len(self.guide_factors) if own else 1
        rest = sum(map(len, (self.guidances, self.highs, self.lows, self.steps, self.churns)))
        return 2 * len(self.sigma_rels) + guides + rest


def has_snapshots(path: Path) -> bool:
    """Return whether a path is the folder of a run with snapshots, not a model file or a folder of one."""
    return (path / SNAPSHOTS).is_dir()
