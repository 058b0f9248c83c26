"""Groups of a training run's settings: frozen dataclasses, checked when they are created.

The descriptions below the fields are printed by `edm2 train --help`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from edm2.ema import sigma_rel_to_gamma
from edm2.ema.maths.plans import named_plan
from edm2.extras import needed
from edm2.train.amounts import Amount
from edm2.train.conditions import Resampling

with needed("edm2.train"):
    import tyro

# Where the command line's names differ from those of the fields.
OPTION_NAMES = {"num_images": "images", "batch_size": "batch"}
_GROUPS = {
    "DataConfig": "dataset.",
    "NetworkConfig": "network.",
    "OptimizerConfig": "optimizer.",
    "LossConfig": "loss.",
    "EMAConfig": "ema.",
    "ConsistencyConfig": "consistency.",
    "ValidateConfig": "validate.",
}


def require(config: object, name: str, holds: bool, rule: str) -> None:
    """Raise ValueError with the option and field of a setting, unless the rule holds."""
    if not holds:
        option = _GROUPS.get(type(config).__name__, "") + OPTION_NAMES.get(name, name)
        raise ValueError(
            f"{name} {getattr(config, name)} must be {rule}: change --{option.replace('_', '-')} ({name} in Python)"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How stored images become network inputs."""

    pad_to: int | None = None
    """Side in pixels to which images are padded with zeros; None for no padding."""
    crop: int | None = None
    """Side in pixels of the random square that is cut out of each image, and of its condition, at each use. The network
    makes images of that size. Default: whole images."""
    labels: bool = True
    """Whether to condition on the data's classes, if it has any."""
    coding: Literal["measured", "plain", "fixed", "latents"] = "measured"
    """measured: each channel gets zero mean and standard deviation sigma_data, as measured on the data. plain: pixels
    as x / 127.5 - 1. fixed: the given mean and std. latents: 2 x C channels, means then standard deviations, from
    which a fresh latent is drawn at each use and coded with the given mean and std."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for fixed and latents (of x / 127.5 - 1 where the images are bytes)."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, for fixed and latents."""
    mirror: bool = False
    """Whether each image is mirrored left to right with probability 1/2, decided again at each use."""
    augment: float = 0.0
    """For small data sets: probability of each random flip, scaling, rotation, stretch and shift of
    `edm2.data.Augmentation`; 0 for none. The network sees which were applied, so that samples show none. EDM used 0.12
    to 0.15."""
    skip_damaged: bool = False
    """Whether to skip damaged images, with a warning that counts them, instead of stopping before the run starts."""
    max_images: int | None = None
    """Maximum number of images to train on; a larger data set is thinned by a fixed rule. Default: all."""
    missing: Literal["refuse", "mask"] = "refuse"
    """What NaN in float data means. refuse: an error. mask: a missing value, which is left out of the loss; in
    conditions it becomes 0, and the network sees where values are known."""
    resample: Resampling | None = None
    """How to resample conditions whose size differs from that of the images: bicubic, bilinear or nearest."""

    def __post_init__(self) -> None:
        if self.mirror and self.coding == "latents":
            raise ValueError(
                "mirror does not suit latents, because a mirrored latent is not the latent of the mirrored picture: "
                "leave it out, and encode mirrored pictures too"
            )
        require(self, "crop", self.crop is None or self.crop >= 1, "at least 1")
        require(self, "augment", 0 <= self.augment <= 1, "a probability, in [0, 1]")
        require(self, "max_images", self.max_images is None or self.max_images >= 1, "at least 1")
        if self.augment and self.coding == "latents":
            raise ValueError(
                f"augment {self.augment} does not suit latents, because a transformed latent is not the latent of the "
                "transformed picture: leave it out"
            )
        given = bool(self.mean and self.std)
        if given != (self.coding in ("fixed", "latents")):
            raise ValueError(
                f"data coding {self.coding!r} with mean {self.mean} and std {self.std}: 'fixed' and 'latents' need "
                "both, the others take neither"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size of the network; see `edm2.nn.UNet`."""

    model_channels: int = 192
    """Base width."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level, in units of model_channels; each level halves the resolution."""
    num_blocks: int = 3
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] | None = None
    """Resolutions with attention. Default: 16 and 8, where levels have them; for config A also 32."""
    channels_per_head: int = 64
    """Width of an attention head."""
    dropout: float | None = None
    """Dropout probability. Default: 0 for config G, 0.1 for A to F."""

    def __post_init__(self) -> None:
        for name in ("model_channels", "num_blocks", "channels_per_head"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        whole = len(self.channel_mult) >= 1 and min(self.channel_mult) >= 1
        require(self, "channel_mult", whole, "one or more numbers of at least 1")
        require(self, "dropout", self.dropout is None or 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, or AdamW, and its learning rate; see `edm2.train.learning_rate`."""

    ref_lr: float = 0.01
    """Learning rate after the ramp-up."""
    decay: Literal["inverse-sqrt", "cosine"] = "inverse-sqrt"
    """Decay of the learning rate: with the inverse square root after ref_batches steps, or along half a cosine to 0 at
    the end of the run, whose length then cannot change any more."""
    ref_batches: float = 70000
    """Steps after which the learning rate decays with the inverse square root; 0 for a constant rate."""
    rampup_mimg: float = 10.0
    """Length of the linear ramp-up, in millions of images; 0 for none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) of weights with two or more dimensions; not for configs D to G."""
    clip: float = 0.0
    """Maximum norm of the gradient of all weights together; 0 for no clipping."""

    def __post_init__(self) -> None:
        require(self, "ref_lr", 0 < self.ref_lr < math.inf, "above 0 and finite")
        for name in ("ref_batches", "rampup_mimg", "weight_decay", "clip"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)")
        require(self, "eps", self.eps > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Noise levels seen in training: ln sigma ~ N(p_mean, p_std^2)."""

    p_mean: float = -0.4
    """Mean of ln sigma."""
    p_std: float = 1.0
    """Standard deviation of ln sigma."""
    sigma_data: float = 0.5
    """Standard deviation of the coded data."""
    uncertainty: bool | None = None
    """Whether a learned uncertainty balances the noise levels. Default: yes, except for config A. Without it, the loss
    is EDM's."""

    def __post_init__(self) -> None:
        require(self, "p_mean", math.isfinite(self.p_mean), "finite")
        require(self, "p_std", 0 < self.p_std < math.inf, "above 0 and finite")
        require(self, "sigma_data", 0 < self.sigma_data < math.inf, "above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency tuning of a teacher; see `edm2.train.consistency`."""

    teacher: Annotated[str, tyro.conf.Suppress] = ""
    """Identifies this teacher, its guide and its coding."""
    path: Literal["data", "teacher"] = "data"
    """Path to the lower noise level. data: towards the training image that the point was made from. teacher: by a
    step of the teacher's ODE, which a guided teacher needs; costs half more time, with a guide twice as much."""
    sigma_max: float | None = None
    """Noise level from which the student makes images. Default: 2.5 times the norm of an image, but 10 to
    80."""
    halvings: int = 4
    """Number of times that the gap between the noise levels of a pair is halved."""
    halving_images: int | None = None
    """Images for each halving; afterwards the gap stays constant. Default: it is smallest at the end of the run."""
    huber: float = 0.0005
    """Scale of errors, relative to the image's norm, below which the loss is quadratic and above which it is linear."""
    guidance: Annotated[float, tyro.conf.Suppress] = 1.0
    """Weight with which the teacher is guided; 1 for none."""
    interval: Annotated[tuple[float, float], tyro.conf.Suppress] = (0.0, 80.0)
    """Noise levels (low, high] at which the guide acts."""

    def __post_init__(self) -> None:
        require(self, "halvings", 0 <= self.halvings <= 20, "between 0 and 20")
        every = self.halving_images
        require(self, "halving_images", every is None or every >= 1, "at least 1")
        require(self, "huber", 0 < self.huber < math.inf, "above 0 and finite")
        highest = self.sigma_max
        require(self, "sigma_max", highest is None or 5 <= highest < math.inf, "at least 5, and finite")
        if self.guidance != 1 and self.path == "data":
            raise ValueError(
                f"path 'data' cannot follow a teacher with guidance {self.guidance:g}: choose --consistency.path "
                "teacher, or a teacher without a guide"
            )


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages of the weights that are tracked and stored; lengths in between can be reconstructed afterwards.

    The default is the plan `compact`: eight averages that give any length from 0.03 to 0.25 at any stored moment,
    without a history. With the default `snapshot_images` that is 16 files, where the paper's pair needs 512.
    """

    sigma_rels: tuple[float, ...] = named_plan("compact").sigma_rels
    """Lengths of the tracked averages, relative to the training time."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of stored snapshots."""

    def __post_init__(self) -> None:
        different = len(self.sigma_rels) == len(set(self.sigma_rels)) >= 1
        require(self, "sigma_rels", different, "one or more different lengths")
        sigma_rel_to_gamma(self.sigma_rels)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """How held-out images are used, if there are any (`validation`)."""

    every: Amount | None = None
    """Images between measurements; one more is made at the end. Default: as between checkpoints."""
    most: Amount = 1024
    """Maximum number of held-out images to measure."""
    condition: str | None = None
    """Images given with those of another data set, as in `condition`. Default: the `conditions` that it holds."""
    min_change: float = 0.001
    """For stop_when_flat: share by which a loss must be below the previous lowest to count as lower."""
    window: int = 1
    """For stop_when_flat: number of measurements in the running mean that is compared."""

    def __post_init__(self) -> None:
        require(self, "every", self.every is None or self.every >= 1, "at least 1")
        for name in ("most", "window"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "min_change", 0 <= self.min_change < 1, "in [0, 1)")
