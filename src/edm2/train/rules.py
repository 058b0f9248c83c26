"""What training must do for each configuration, as data.

Each configuration is written as its difference from the one before, like its network in `edm2.nn.configs`.

Ref: EDM2 Table 1, Fig. 16-22, App. B.1-B.7.
"""

from dataclasses import dataclass, replace
from typing import Literal

from edm2.nn import CONFIGS


@dataclass(frozen=True, kw_only=True)
class TrainingRules:
    """How the paper trains one configuration at size S on ImageNet-512. The defaults are those of config A.

    A smaller run keeps betas, eps, loss_scaling, p_mean, p_std, forced_weight_norm, dropout, and whether the
    learning rate decays. Lengths, batch size and rates belong to the paper's scale.
    """

    config: str
    """The configuration's letter."""
    num_images: int = 2048 << 20
    """Length of the run."""
    batch_size: int = 4096
    """Images a step."""
    ref_lr: float = 0.0001
    """Learning rate after the ramp-up."""
    ref_batches: float = 0
    """Steps after which the rate decays with the inverse square root; 0 for never."""
    rampup_mimg: float = 10.0
    """Length of the linear ramp-up of the rate, in millions of images."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments. No weight decay and no clipping of gradients in any configuration."""
    eps: float = 1e-8
    """Adam's epsilon. Known for A and G; the paper gives none for B to F, which use the same."""
    loss_scaling: float = 100.0
    """Factor on the loss, never undone: it keeps float16 gradients from underflow and reaches Adam through eps only."""
    p_mean: float = -1.2
    """Mean of ln sigma in training."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in training."""
    ema: Literal["traditional", "power"] = "traditional"
    """One exponential average, or power-function averages from which others can be reconstructed."""
    ema_halflife_mimg: float = 50.0
    """Half-life of the exponential average, in millions of images; see `traditional_decay`."""
    sigma_rels: tuple[float, ...] = ()
    """Lengths of the power-function averages that are tracked."""
    best_sigma_rel: float = 0.034
    """Length of the average with the paper's best Frechet distance."""
    float16: Literal["partial", "full"] = "partial"
    """partial: embedding and attention logits stay float32; full: the whole network runs in float16. Either way,
    gradients that are not finite are set to 0 before each step."""

    @property
    def forced_weight_norm(self) -> bool:
        """Whether stored weights are normalised before each step, see `edm2.nn.ForcedWeightNorm`."""
        return CONFIGS[self.config].weights == "forced"

    @property
    def learned_uncertainty(self) -> bool:
        """Whether the loss is weighted with a learned u(sigma), see `edm2.diffusion.edm2_loss`."""
        return CONFIGS[self.config].uncertainty

    @property
    def dropout(self) -> float:
        """Dropout probability at size S, the default of `edm2.diffusion.build_denoiser`."""
        return CONFIGS[self.config].dropout


_A = TrainingRules(config="A")

_B = replace(
    _A,
    config="B",
    batch_size=2048,
    ref_lr=0.0002,
    betas=(0.9, 0.99),
    p_mean=-0.4,
    p_std=1.0,
    ema="power",
    sigma_rels=(0.05, 0.10),
    best_sigma_rel=0.090,
)

_C = replace(_B, config="C", float16="full", best_sigma_rel=0.075)

_D = replace(_C, config="D", ref_lr=0.0100, loss_scaling=1.0, best_sigma_rel=0.225)

_E = replace(_D, config="E", ref_batches=70_000, best_sigma_rel=0.145)

_F = replace(_E, config="F", best_sigma_rel=0.100)

_G = replace(_F, config="G", best_sigma_rel=0.130)

_RULES = {rules.config: rules for rules in (_A, _B, _C, _D, _E, _F, _G)}


def training_rules(config: str) -> TrainingRules:
    """Settings that a configuration needs in training.

    Args:
        config: `A` to `G`.

    Raises:
        ValueError: If there is no such configuration.
    """
    if config not in _RULES:
        raise ValueError(f"config {config!r} is not one of {', '.join(_RULES)}; G is the published one")
    return _RULES[config]


def traditional_decay(num_images: float, *, batch_size: int, halflife_mimg: float = 50.0) -> float:
    """Factor by which an update of config A's average keeps the average: `0.5 ** (batch_size / half-life)`.

    The half-life is at most 5% of the images seen, so that the random start is soon forgotten.

    Args:
        num_images: Images seen, including those of this step.
        batch_size: Images since the last update.
        halflife_mimg: Half-life, in millions of images.

    Returns:
        A number in [0, 1).

    Ref: EDM2 App. B.1; EDM (arXiv 2206.00364) App. F.2.
    """
    return float(0.5 ** (batch_size / min(halflife_mimg * 1e6, 0.05 * num_images)))
