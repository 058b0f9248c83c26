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

from edm2.extras import needed
from edm2.train.amounts import Amount
from edm2.train.config_groups import (
    ConsistencyConfig,
    DataConfig,
    EMAConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    ValidateConfig,
    require,
)

with needed("edm2.train"):
    import tyro

_NAME = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run. Equal settings, data and machine give equal files."""

    data: str = ""
    """Training images: digits, fashion-mnist, hf://NAME, or the path of an image folder, a ZIP, a .npy, .npz,
    zarr, NetCDF or Parquet file, or a folder of IDX files; see docs/data.md and docs/pairs.md."""
    condition: str | None = None
    """Condition images, one for each training image: a folder, ZIP or array, matched by name. Default: the `conditions`
    of the training data, if it has any; see docs/pairs.md."""
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
    """Start from the weights of a model instead of random ones: a finished run, a model file, or a folder with one. The
    network must be the same, but may have more classes or condition channels, and another resolution. On the command
    line, there is then no ramp-up of the learning rate, unless --optimizer.rampup-mimg is given."""
    objective: Literal["denoise", "mean"] = "denoise"
    """denoise: a diffusion model. mean: the same network as a regression, which predicts the image from its condition
    and label."""
    residual: str | None = None
    """Regression (a run with the objective mean, or its model) whose residuals this run models. Samples are the
    regression plus a sampled residual, and images are coded as in the regression."""
    label_dropout: float = 0.0
    """Probability that an image is shown without its label, so that the network can later guide itself (`edm2 sample
    --guide self`)."""
    sigma_max: float = 80.0
    """Highest noise level that the model is sampled from by default; it does not change the training."""
    seed: int = 0
    """Seed of the weights, the order of images, noise and dropout."""
    snapshot_images: Amount | None = None
    """Images between snapshots of the averages; one more is taken at the end. Default: half-way and at the end, which
    is enough for the default averages."""
    checkpoint_images: Amount = 8 << 20
    """Images between checkpoints; one more is written at the end."""
    log_images: Amount = 64 << 10
    """Images between lines of the log."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every Nth checkpoint permanently; 0 for none."""
    validation: str | None = None
    """Held-out images on which the loss is measured: a share of the training images, such as 0.1, or a data set as for
    data."""
    keep_best: int = 0
    """Number of checkpoints with the lowest loss on held-out images to keep in addition to the newest."""
    stop_when_flat: int = 0
    """Number of measurements on held-out images without a lower loss after which the run ends; 0 for never."""
    max_hours: float | None = None
    """Hours after which the run saves and stops with exit code 75 (0 under torchrun); the same command continues it."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the network; weights, loss and averages stay float32. auto: the faster of float32 and bfloat16 in
    a few steps, measured when the run begins."""
    workers: int = 2
    """Threads that read images in advance; 0 reads them when they are needed."""
    verify_data: bool = True
    """Whether to decode every image before the run starts, so that damage cannot stop it half-way."""
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
    """Factor on the loss, removed from the gradients again; it keeps small float16 gradients above 0."""
    compile: bool = False
    """Whether to compile the network's blocks with torch.compile, which takes a minute or more to start. On a CPU, the
    step does not become faster."""
    record_magnitudes: bool = True
    """Whether to record the magnitudes of one step with each line of the log, for `edm2 report`; off with sharding."""
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
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("keep_every", "workers", "keep_best", "stop_when_flat"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        require(self, "loss_scaling", 0 < self.loss_scaling < math.inf, "above 0 and finite")
        if self.max_hours is not None:
            require(self, "max_hours", self.max_hours > 0, "above 0")
        every = self.snapshot_images
        require(self, "snapshot_images", every is None or every >= 1, "at least 1")
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
                "objective mean trains a regression, and residual a model of its residuals: give only one of them"
            )
        share = self.validation_share
        require(self, "validation", share is None or 0 < share < 1, "a share between 0 and 1, or a data set")
        require(self, "label_dropout", 0 <= self.label_dropout < 1, "a probability, in [0, 1)")
        require(self, "sigma_max", 0.002 < self.sigma_max < math.inf, "above 0.002 and finite")
        require(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        if self.microbatch is not None:
            divides = 1 <= self.microbatch <= self.batch_size and self.batch_size % self.microbatch == 0
            require(self, "microbatch", divides, f"a divisor of batch {self.batch_size}")

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
    "": ("network_from", "condition", "label_dropout", "objective", "sigma_max"),
    "dataset": ("crop", "augment", "max_images", "missing", "resample"),
    "optimizer": ("decay", "weight_decay", "clip"),
    "loss": ("uncertainty",),
}
