"""What the experiment trains and how it judges, the same for every configuration."""

import dataclasses
import math
from dataclasses import dataclass

from edm2.diffusion import SamplerName, find_sampler
from edm2.ema.maths.profiles import sigma_rel_to_gamma
from edm2.nn import CONFIGS
from edm2.train import TrainConfig

# Seeds of samples: the search for rate and length never sees those of the result.
SEARCH_SEED, FINAL_SEED = 1_000_000, 2_000_000
RATE_RUN_SEED = 1_000
_MAX_RAMPUP = 0.1  # of a run


@dataclass(frozen=True, kw_only=True)
class LadderPlan:
    """What is trained and how it is judged; the same for every configuration.

    Attributes:
        configs: Configurations, in the order of the table.
        seeds: Seeds of the training runs.
        dropout: Dropout probability in every configuration; default: that of each, which is 0.1 in A to F unless the
            settings say otherwise, and 0 in G.
        rate_factors: Factors to try on the learning rate that the paper's proportions give, in runs of their own; the
            one with the lowest Frechet distance is used. With one factor there is no search.
        rate_images: Length of these runs, in images.
        sigma_rels: EMA lengths to try after training.
        search_samples: Images for each choice of learning rate and EMA length.
        final_samples: Images for the result.
        num_steps: Noise levels of the sampler.
        sampler: Name in `edm2.diffusion.SAMPLERS`.

    Raises:
        ValueError: If a value is out of range.
    """

    configs: tuple[str, ...] = tuple(CONFIGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    dropout: float | None = None
    rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    rate_images: int = 10_000
    sigma_rels: tuple[float, ...] = (0.03, 0.05, 0.075, 0.10, 0.14, 0.20, 0.25)
    search_samples: int = 500
    final_samples: int = 1000
    num_steps: int = 16
    sampler: SamplerName = "heun"

    def __post_init__(self) -> None:
        unknown = [c for c in self.configs if c not in CONFIGS]
        if unknown:
            raise ValueError(f"config {unknown[0]!r} is not one of {', '.join(CONFIGS)}")
        for name in ("configs", "seeds", "rate_factors", "sigma_rels"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {values} must be one or more different values")
        least = {"rate_images": 1, "search_samples": 2, "final_samples": 2, "num_steps": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {lowest}")
        sigma_rel_to_gamma(self.sigma_rels)
        if RATE_RUN_SEED in self.seeds:
            raise ValueError(
                f"seed {RATE_RUN_SEED} belongs to the search for learning rates: choose other seeds"
            )
        if min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds} must be 0 or more")
        if not all(0 < factor < math.inf for factor in self.rate_factors):
            raise ValueError(f"rate_factors {self.rate_factors} must be above 0 and finite")
        if self.search_samples > FINAL_SEED - SEARCH_SEED:
            raise ValueError(
                f"search_samples {self.search_samples} would reach the seeds of the result: give at most "
                f"{FINAL_SEED - SEARCH_SEED}"
            )
        find_sampler(self.sampler)


def with_length(
    config: TrainConfig, num_images: int | None = None, batch_size: int | None = None
) -> TrainConfig:
    """Change the length or batch of a run, and let its learning rate take the same course.

    The decay, if there is one, starts at the same share of the run. The ramp-up keeps its length, up to a tenth of the
    run, because Adam's moments need that many steps in a short run too.

    Args:
        config: Any settings.
        num_images: Length in images; default: unchanged.
        batch_size: Images per step; default: unchanged.

    Returns:
        The changed settings.

    Raises:
        ValueError: If length or batch is below 1.
    """
    resized = dataclasses.replace(
        config,
        num_images=config.num_images if num_images is None else num_images,
        batch_size=config.batch_size if batch_size is None else batch_size,
    )
    stretch = (resized.num_images / config.num_images) / (resized.batch_size / config.batch_size)
    optimizer = dataclasses.replace(
        config.optimizer,
        ref_batches=config.optimizer.ref_batches * stretch,
        rampup_mimg=min(config.optimizer.rampup_mimg, _MAX_RAMPUP * resized.num_images / 1e6),
    )
    return dataclasses.replace(resized, optimizer=optimizer)
