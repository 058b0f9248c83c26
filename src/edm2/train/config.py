"""The settings of a training run: frozen dataclasses, checked when they are created.

The descriptions below the fields are printed by `edm2 train --help`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from edm2.ema import sigma_rel_to_gamma
from edm2.ema.maths.plans import named_plan
from edm2.extras import needed
from edm2.train.amounts import Amount
from edm2.train.conditions import Resampling

with needed("edm2.train"):
    import tyro

_NAME = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How stored images become network inputs."""

    pad_to: int | None = None
    """Side in pixels to which images are padded with zeros; None for no padding."""
    labels: bool = True
    """Whether to condition on the data's classes, if it has any."""
    coding: Literal["measured", "plain", "fixed", "latents"] = "measured"
    """measured: each channel gets zero mean and standard deviation sigma_data, as measured on the data. plain: pixels
    as x / 127.5 - 1. fixed: the given mean and std. latents: 2 x C channels, means then standard deviations, from
    which a fresh latent is drawn at each use and coded with the given mean and std."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for fixed and latents (of x / 127.5 - 1 where the images are bytes)."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""
    mirror: bool = False
    """Whether each image is mirrored left to right with probability 1/2, decided anew at each use."""
    augment: float = 0.0
    """For small data sets: probability of each random flip, scaling, rotation, stretch and shift of
    `edm2.data.Augmentation`; 0 for none. The network is told about them, so that samples show none. EDM used 0.12 to
    0.15."""
    skip_damaged: bool = False
    """Whether to skip damaged images, with a warning that counts them, instead of stopping before the run starts."""
    max_images: int | None = None
    """Most images to train on; a larger data set is thinned by a fixed rule. Default: all."""
    missing: Literal["refuse", "mask"] = "refuse"
    """What NaN in float data means. refuse: an error. mask: a missing value, which is left out of the loss; in
    conditions it becomes 0, and the network is told where values are known."""
    resample: Resampling | None = None
    """How conditions of another size than the images are resampled: bicubic, bilinear or nearest."""

    def __post_init__(self) -> None:
        if self.mirror and self.coding == "latents":
            raise ValueError(
                "mirror does not suit latents, because a mirrored latent is not the latent of the mirrored picture: "
                "leave it out, and encode mirrored pictures too"
            )
        _require(self, "augment", 0 <= self.augment <= 1, "a probability, in [0, 1]")
        _require(self, "max_images", self.max_images is None or self.max_images >= 1, "at least 1")
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
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        whole = len(self.channel_mult) >= 1 and min(self.channel_mult) >= 1
        _require(self, "channel_mult", whole, "one or more numbers of at least 1")
        _require(self, "dropout", self.dropout is None or 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, or AdamW, and its learning rate; see `edm2.train.learning_rate`."""

    ref_lr: float = 0.01
    """Learning rate after the ramp-up."""
    decay: Literal["inverse-sqrt", "cosine"] = "inverse-sqrt"
    """How the rate falls: with the inverse square root after ref_batches steps, or along half a cosine to 0 at the end
    of the run, whose length then cannot change any more."""
    ref_batches: float = 70000
    """Steps after which the rate decays with the inverse square root; 0 for never, which is a constant rate."""
    rampup_mimg: float = 10.0
    """Length of the linear ramp-up, in millions of images; 0 for none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) of weights with two or more dimensions; not for configs D to G."""
    clip: float = 0.0
    """Norm that the gradient of all weights together is clipped to; 0 for no clipping."""

    def __post_init__(self) -> None:
        _require(self, "ref_lr", 0 < self.ref_lr < math.inf, "above 0 and finite")
        for name in ("ref_batches", "rampup_mimg", "weight_decay", "clip"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)")
        _require(self, "eps", self.eps > 0, "above 0")


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
    """Whether noise levels are balanced by a learned uncertainty. Default: as the configuration has it, which is yes
    but for A. Without it the loss is that of EDM."""

    def __post_init__(self) -> None:
        _require(self, "p_mean", math.isfinite(self.p_mean), "finite")
        _require(self, "p_std", 0 < self.p_std < math.inf, "above 0 and finite")
        _require(self, "sigma_data", 0 < self.sigma_data < math.inf, "above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency tuning of a teacher; see `edm2.train.consistency`."""

    teacher: Annotated[str, tyro.conf.Suppress] = ""
    """What tells this teacher, its guide and its coding from others."""
    path: Literal["data", "teacher"] = "data"
    """How a point moves to the lower noise level. data: towards the training image that it was made from. teacher: by a
    step of the teacher's ODE, which a guided teacher needs; costs a third more time, with a guide two thirds."""
    halvings: int = 6
    """Number of times that the gap between the noise levels of a pair is halved."""
    halving_images: int | None = None
    """Images for each halving; the gap then stays. Default: it is smallest at the end of the run."""
    huber: float = 0.0005
    """Scale of errors, relative to the image's norm, below which the loss is quadratic and above which it is linear."""
    guidance: Annotated[float, tyro.conf.Suppress] = 1.0
    """Weight with which the teacher is guided; 1 for none."""
    interval: Annotated[tuple[float, float], tyro.conf.Suppress] = (0.0, 80.0)
    """Noise levels (low, high] at which the guide acts."""

    def __post_init__(self) -> None:
        _require(self, "halvings", 0 <= self.halvings <= 20, "between 0 and 20")
        every = self.halving_images
        _require(self, "halving_images", every is None or every >= 1, "at least 1")
        _require(self, "huber", 0 < self.huber < math.inf, "above 0 and finite")
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
        _require(self, "sigma_rels", different, "one or more different lengths")
        sigma_rel_to_gamma(self.sigma_rels)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """How held-out images are used, if there are any (`validation`)."""

    every: Amount | None = None
    """Images between measurements; one more is made at the end. Default: as between checkpoints."""
    most: Amount = 1024
    """Number of held-out images that are measured."""
    min_change: float = 0.001
    """For stop_when_flat: share by which a loss must fall below the lowest one to count as lower."""
    window: int = 1
    """For stop_when_flat: measurements in the running mean that is looked at."""

    def __post_init__(self) -> None:
        _require(self, "every", self.every is None or self.every >= 1, "at least 1")
        for name in ("most", "window"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "min_change", 0 <= self.min_change < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run. Equal settings, data and machine give equal files."""

    data: str = ""
    """Training images: digits, fashion-mnist, hf://NAME, or the path of an image folder, a ZIP, a .npy, .npz,
    zarr, NetCDF or Parquet file, or a folder of IDX files; see docs/data.md and docs/pairs.md."""
    condition: str | None = None
    """Images given to the network with the training images: a folder, ZIP or array of as many images, matched by name.
    Default: the `conditions` of the training data, if it has any; see docs/pairs.md."""
    num_images: Annotated[Amount, _NAME(name="images")] = 2048 << 20
    """Length of the run in images; it ends after the step that reaches it."""
    batch_size: Annotated[Amount, _NAME(name="batch")] = 2048
    """Images per step."""
    microbatch: Amount | None = None
    """Images per forward pass, a divisor of batch; smaller takes less memory. Default: the whole batch."""
    config: Literal["A", "B", "C", "D", "E", "F", "G"] = "G"
    """Configuration of the paper. On the command line it also changes the preset's learning rate, noise levels and
    dropout as the paper does; in Python, `edm2.train.with_config.with_config` does that."""
    network_from: str | None = None
    """MODULE:FUNCTION that makes a network of your own, called as f(img_resolution, img_channels, label_dim); see
    docs/own_network.md. The options of --network are then ignored."""
    init: str | None = None
    """Start from weights instead of random numbers: a finished run, a model file, or a folder with one. The network
    must be the same, but may have further classes or channels of a condition, and another resolution."""
    objective: Literal["denoise", "mean"] = "denoise"
    """denoise: a diffusion model. mean: the same network as a regression, which expects the image from its condition
    and label."""
    residual: str | None = None
    """Regression (a run of the objective mean, or its model) that this run models the residuals of; samples are the
    regression plus a sampled residual. The coding of images is the regression's."""
    label_dropout: float = 0.0
    """Probability that an image is shown without its label, so that the network can be guided by itself without labels
    (`edm2 sample --guide self`)."""
    seed: int = 0
    """Seed of the weights, the order of images, noise and dropout."""
    snapshot_images: Amount | None = None
    """Images between snapshots of the averages; one more is taken at the end. Default: halfway and at the end, which is
    enough for the default averages."""
    checkpoint_images: Amount = 8 << 20
    """Images between checkpoints; one more is written at the end."""
    log_images: Amount = 64 << 10
    """Images between lines of the log."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every Nth checkpoint permanently; 0 for none."""
    validation: str | None = None
    """Held-out images, on which the loss is measured: a share of the training images, such as 0.1, or a data set as in
    data."""
    keep_best: int = 0
    """Number of checkpoints with the lowest loss on held-out images to keep, beside the newest."""
    stop_when_flat: int = 0
    """Measurements on held-out images without a lower loss after which the run ends; 0 for never."""
    max_hours: float | None = None
    """Hours after which the run saves and stops with exit code 75 (0 under torchrun); the same command continues it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network; weights, loss and averages stay float32."""
    workers: int = 2
    """Threads that read images in advance; 0 reads them when they are needed."""
    verify_data: bool = True
    """Whether to decode every image before the run starts, so that damage is not found in the middle of it."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    ema_device: Literal["auto", "model", "cpu"] = "auto"
    """Where the averages are kept: with the weights, or in host memory. auto: in host memory if they would take more
    than a quarter of the device's free memory."""
    channels_last: bool | None = None
    """Memory format of convolutions. Default: the faster one, channels last except for A and B on the CPU."""
    sharding: Literal["none", "full"] = "none"
    """With several processes: none, each holds the whole network (DDP); full, each holds a part of it (FSDP2)."""
    checkpoint_activations: bool = False
    """Whether to recompute activations in the backward pass: less memory, a third more time."""
    loss_scaling: float = 1.0
    """Factor on the loss, undone on the gradients; keeps small float16 gradients above 0."""
    compile: bool = False
    """Whether to use torch.compile, which takes minutes to start and pays off in long runs."""
    record_magnitudes: bool = True
    """Whether to record the magnitudes of one step with each line of the log, for `edm2 report`; not with sharding."""
    stop_after_nonfinite: int = 8
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops."""
    dataset: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    consistency: Annotated[ConsistencyConfig | None, tyro.conf.Suppress, tyro.conf.Fixed] = None
    """Consistency tuning, set by `edm2 distill`. Default: train a diffusion model."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    def __post_init__(self) -> None:
        for name in (
            "num_images", "batch_size", "checkpoint_images", "log_images",
            "keep_checkpoints", "stop_after_nonfinite",
        ):  # fmt: skip
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("keep_every", "workers", "keep_best", "stop_when_flat"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "loss_scaling", 0 < self.loss_scaling < math.inf, "above 0 and finite")
        if self.max_hours is not None:
            _require(self, "max_hours", self.max_hours > 0, "above 0")
        every = self.snapshot_images
        _require(self, "snapshot_images", every is None or every >= 1, "at least 1")
        if self.optimizer.weight_decay and self.network_from is None and self.config in "DEFG":
            raise ValueError(
                f"optimizer.weight_decay {self.optimizer.weight_decay} does not suit config {self.config}: its weights "
                "are normalised at each use, so decay would only shrink its gains and change the effective learning "
                "rate; leave it out, or take config A, B or C, or a network of your own"
            )
        if self.loss.uncertainty and self.config == "A":
            raise ValueError(
                "loss.uncertainty True does not suit config A, which has no learned uncertainty: take config B"
            )
        for name in ("keep_best", "stop_when_flat"):
            if getattr(self, name) and self.validation is None:
                raise ValueError(
                    f"{name} {getattr(self, name)} needs held-out images: give validation, such as 0.1"
                )
        if self.objective == "mean" and self.residual is not None:
            raise ValueError(
                "objective mean trains a regression and residual models what one leaves: give one of the two"
            )
        share = self.validation_share
        _require(self, "validation", share is None or 0 < share < 1, "a share between 0 and 1, or a data set")
        _require(self, "label_dropout", 0 <= self.label_dropout < 1, "a probability, in [0, 1)")
        _require(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        if self.microbatch is not None:
            divides = 1 <= self.microbatch <= self.batch_size and self.batch_size % self.microbatch == 0
            _require(self, "microbatch", divides, f"a divisor of batch {self.batch_size}")

    @property
    def snapshot_interval(self) -> int:
        """Images between snapshots."""
        return math.ceil(self.num_images / 2) if self.snapshot_images is None else self.snapshot_images

    @property
    def validation_share(self) -> float | None:
        """Share of the training images that is held out; None if none are."""
        with contextlib.suppress(TypeError, ValueError):
            return float(self.validation)  # type: ignore[arg-type]
        return None

    @property
    def validation_interval(self) -> int:
        """Images between measurements on held-out images."""
        return self.checkpoint_images if self.validate.every is None else self.validate.every

    @property
    def num_steps(self) -> int:
        """Steps that reach `num_images`."""
        return math.ceil(self.num_images / self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        if self.consistency is None:
            del settings["consistency"]
        return settings

    def identity(self, models: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What must stay the same when a run is continued.

        Args:
            models: What identifies the models that settings name, by setting; see `edm2.train.initial.identify_models`.
        """
        free = {
            "init", "residual", "num_images",
            "microbatch", "verify_data", "ema_device", "snapshot_images", "checkpoint_images",
            "keep_checkpoints", "keep_every", "validation", "validate", "keep_best", "stop_when_flat",
            "max_hours", "workers", "device", "channels_last", "sharding", "checkpoint_activations", "loss_scaling",
            "compile", "record_magnitudes", "stop_after_nonfinite",
        }  # fmt: skip
        kept = {key: value for key, value in self.to_json().items() if key not in free}
        # Runs that were started before these options and names existed continue.
        for group, names in _ADDED.items():
            found, defaults = (kept[group], getattr(self, group)) if group else (kept, self)
            for name in names:
                if found[name] == type(defaults).__dataclass_fields__[name].default:
                    del found[name]
        if self.optimizer.decay == "cosine":
            kept["num_images"] = self.num_images
        kept["architecture"] = kept.pop("config")
        return kept | dict(models or {})

    def run_id(self, fingerprint: str, models: Mapping[str, Any] | None = None) -> str:
        """Name of the run: a hash of its identity and of its data's fingerprint."""
        # Where data lies may change; the fingerprint says what it is.
        identity = {key: value for key, value in self.identity(models).items() if key != "condition"}
        text = json.dumps([identity | {"data": None}, fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Settings that are younger than the first runs, by group.
_ADDED = {
    "": ("network_from", "condition", "label_dropout", "objective"),
    "dataset": ("augment", "max_images", "missing", "resample"),
    "optimizer": ("decay", "weight_decay", "clip"),
    "loss": ("uncertainty",),
}
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


def _require(config: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        option = _GROUPS.get(type(config).__name__, "") + OPTION_NAMES.get(name, name)
        raise ValueError(
            f"{name} {getattr(config, name)} must be {rule}: change --{option.replace('_', '-')} ({name} in Python)"
        )
