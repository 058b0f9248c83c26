"""The configuration of a training run: frozen dataclasses, checked when they are made.

Descriptions below the fields are what `edm2 train --help` prints.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from edm2.ema import sigma_rel_to_gamma
from edm2.ema.maths.plans import named_plan
from edm2.extras import needed

with needed("edm2.train"):
    import tyro

_NAME = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images become what the network sees."""

    pad_to: int | None = None
    """Side in pixels to which images are padded with zeros."""
    labels: bool = True
    """Whether to condition on the data's classes, where it has any."""
    coding: Literal["measured", "plain", "fixed", "latents"] = "measured"
    """measured: zero mean and standard deviation sigma_data in each channel, measured on the data. plain: pixels
    as x / 127.5 - 1. fixed: with the given mean and std. latents: 2 x C channels, means then standard deviations,
    from which a fresh latent is drawn at each use, then coded with the given mean and std."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for fixed and latents (of x / 127.5 - 1 where the images are bytes)."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""
    mirror: bool = False
    """Whether each image is mirrored left to right with probability 1/2, anew at each use."""
    augment: float = 0.0
    """For small data sets: probability of each of the random flips, scalings, turns, stretches and shifts of
    `edm2.data.Augmentation`, anew at each use; 0 for none. The network is told of them, so that samples show none.
    EDM used 0.12 to 0.15."""
    skip_damaged: bool = False
    """Leave damaged images out, with a warning that counts them, instead of stopping before the run starts."""

    def __post_init__(self) -> None:
        if self.mirror and self.coding == "latents":
            raise ValueError(
                "mirror does not suit latents, whose mirror image is none of a mirrored picture: encode mirrored "
                "pictures too"
            )
        _require(0 <= self.augment <= 1, "augment", self.augment, "a probability, in [0, 1]")
        if self.augment and self.coding == "latents":
            raise ValueError(
                f"augment {self.augment} does not suit latents, whose flipped and turned images are none of flipped "
                "and turned pictures: leave it out"
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
    """Residual blocks a level."""
    attn_resolutions: tuple[int, ...] | None = None
    """Resolutions with attention; by default those of 16 and 8 that occur, for config A also 32."""
    channels_per_head: int = 64
    """Width of an attention head."""
    dropout: float | None = None
    """Dropout probability; by default the configuration's, 0 for G and 0.1 for A to F."""

    def __post_init__(self) -> None:
        for name in ("model_channels", "num_blocks", "channels_per_head"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        whole = len(self.channel_mult) >= 1 and min(self.channel_mult) >= 1
        _require(whole, "channel_mult", self.channel_mult, "one or more numbers of at least 1")
        _require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its learning rate; see `edm2.train.learning_rate`."""

    ref_lr: float = 0.01
    """Learning rate after the ramp-up."""
    ref_batches: float = 70000
    """Steps after which the rate decays with the inverse square root; 0 for never."""
    rampup_mimg: float = 10.0
    """Length of the linear ramp-up, in millions of images; 0 for none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        _require(0 < self.ref_lr < math.inf, "ref_lr", self.ref_lr, "above 0 and finite")
        for name in ("ref_batches", "rampup_mimg"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "in [0, 1)")
        _require(self.eps > 0, "eps", self.eps, "above 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Noise levels seen in training: ln sigma ~ N(p_mean, p_std^2)."""

    p_mean: float = -0.4
    """Mean of ln sigma."""
    p_std: float = 1.0
    """Standard deviation of ln sigma."""
    sigma_data: float = 0.5
    """Standard deviation of the coded data."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.p_mean), "p_mean", self.p_mean, "finite")
        _require(0 < self.p_std < math.inf, "p_std", self.p_std, "above 0 and finite")
        _require(0 < self.sigma_data < math.inf, "sigma_data", self.sigma_data, "above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages of the weights that are tracked and stored; any length between can be had afterwards.

    The default tracks the eight averages of the plan `compact`, which give any length from 0.03 to 0.25 at any stored
    moment without a history: with the default `snapshot_images`, 16 files where the paper's pair needs 512.
    """

    sigma_rels: tuple[float, ...] = named_plan("compact").sigma_rels
    """Lengths of the tracked averages, relative to the training time."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of stored snapshots."""

    def __post_init__(self) -> None:
        different = len(self.sigma_rels) == len(set(self.sigma_rels)) >= 1
        _require(different, "sigma_rels", self.sigma_rels, "one or more different lengths")
        sigma_rel_to_gamma(self.sigma_rels)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run. Two runs with equal settings, data and machine give equal files."""

    data: str = ""
    """Images: digits, fashion-mnist, hf://NAME, or the path of an image folder, a ZIP, a .npy, .npz or Parquet file,
    or a folder of IDX files; docs/data.md has them all."""
    num_images: Annotated[int, _NAME(name="images")] = 2048 << 20
    """Length of the run in images; it ends after the step that reaches it."""
    batch_size: Annotated[int, _NAME(name="batch")] = 2048
    """Images a step."""
    microbatch: int | None = None
    """Images a forward pass, a divisor of batch; smaller takes less memory. Default: the whole batch."""
    config: Literal["A", "B", "C", "D", "E", "F", "G"] = "G"
    """Configuration of the paper. On the command line it also changes the preset's learning rate, noise levels and
    dropout as the paper does; in Python, `edm2.train.with_config.with_config` does that."""
    network_from: str | None = None
    """MODULE:FUNCTION that makes a network of your own, called as f(img_resolution, img_channels, label_dim); see
    docs/own_network.md. The options of --network are then ignored."""
    seed: int = 0
    """Seed of the weights, the order of images, noise and dropout."""
    snapshot_images: int | None = None
    """Images between snapshots of the averages; one more is taken at the end. Default: at half of the run and at the
    end, which is all that the default averages need."""
    checkpoint_images: int = 8 << 20
    """Images between checkpoints; one more is written at the end."""
    log_images: int = 64 << 10
    """Images between lines of the log."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept, the newest."""
    keep_every: int = 0
    """Every so many checkpoints, one is kept for good; 0 for none."""
    max_hours: float | None = None
    """Stop after so many hours as if asked to: save, and end with exit code 75 (0 under torchrun); the same command
    continues."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network; weights, loss and averages stay float32."""
    workers: int = 2
    """Threads that read images ahead; 0 reads them when they are needed."""
    verify_data: bool = True
    """Decode every image before the run starts, so that damage is not found in the middle of it."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    ema_device: Literal["auto", "model", "cpu"] = "auto"
    """Where the averages live: beside the weights, or in host memory. auto: in host memory where they would take more
    than a quarter of the device's free memory."""
    channels_last: bool | None = None
    """Memory format of convolutions. Default: what is faster, channels last in all cases but A and B on the CPU."""
    sharding: Literal["none", "full"] = "none"
    """With several processes. none: each holds the whole network (DDP). full: each holds a part of it (FSDP2)."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    loss_scaling: float = 1.0
    """Factor on the loss, undone on the gradients; keeps small float16 gradients above 0."""
    compile: bool = False
    """Use torch.compile; takes minutes to start, pays in long runs."""
    record_magnitudes: bool = True
    """Whether each line of the log comes with the magnitudes of one step, for `edm2 report`; not with sharding."""
    stop_after_nonfinite: int = 8
    """Number of steps in a row with a loss or gradient that is not finite after which the run stops."""
    dataset: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        for name in (
            "num_images", "batch_size", "checkpoint_images", "log_images",
            "keep_checkpoints", "stop_after_nonfinite",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("keep_every", "workers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(0 < self.loss_scaling < math.inf, "loss_scaling", self.loss_scaling, "above 0 and finite")
        if self.max_hours is not None:
            _require(self.max_hours > 0, "max_hours", self.max_hours, "above 0")
        every = self.snapshot_images
        _require(every is None or every >= 1, "snapshot_images", every, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        if self.microbatch is not None:
            divides = 1 <= self.microbatch <= self.batch_size and self.batch_size % self.microbatch == 0
            _require(divides, "microbatch", self.microbatch, f"a divisor of batch {self.batch_size}")

    @property
    def snapshot_interval(self) -> int:
        """Images between snapshots."""
        return math.ceil(self.num_images / 2) if self.snapshot_images is None else self.snapshot_images

    @property
    def num_steps(self) -> int:
        """Steps that reach `num_images`."""
        return math.ceil(self.num_images / self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return settings

    def identity(self) -> dict[str, Any]:
        """The settings that make a run this run; the others may change when it is continued."""
        free = {
            "num_images", "microbatch", "verify_data", "ema_device", "snapshot_images", "checkpoint_images",
            "keep_checkpoints", "keep_every",
            "max_hours", "workers", "device", "channels_last", "sharding", "checkpoint_activations", "loss_scaling",
            "compile", "record_magnitudes", "stop_after_nonfinite",
        }  # fmt: skip
        kept = {key: value for key, value in self.to_json().items() if key not in free}
        # So that runs from before these options and names continue.
        if not self.dataset.augment:
            del kept["dataset"]["augment"]
        if self.network_from is None:
            del kept["network_from"]
        kept["architecture"] = kept.pop("config")
        return kept

    def run_id(self, fingerprint: str) -> str:
        """Name of the run: a hash of its identity and of its data's fingerprint."""
        text = json.dumps([self.identity() | {"data": None}, fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {value} must be {rule}")
