"""The cost of a run, estimated from a few of its steps."""

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from edm2.data import ImageDataset, Subset
from edm2.ema.maths.plans import memory_bytes
from edm2.nn import count_flops
from edm2.progress import time_text
from edm2.train.build import open_training_data
from edm2.train.config import TrainConfig
from edm2.train.loop import Trainer
from edm2.train.memory import peak_bytes, size_text

_FLOAT_BYTES = 4
_STORED_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_WARMUP_STEPS = 2
# A forward pass, and a backward pass that costs twice as much.
_PASSES = 3
# In `faster_dtype`: images that the coding is measured on, and how much faster bfloat16 must be.
_DTYPE_IMAGES = 1024
_DTYPE_GAIN = 1.05


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Cost of a run.

    Attributes:
        num_images: Length of the run.
        num_params: Number of parameters.
        flops: Multiply-accumulates of a forward pass, per image.
        state_bytes: Weights, gradients, moments of Adam and averages, including the buffers of a long run.
        peak_bytes: Peak memory in the measured steps: of the process on a CPU, of tensors on a GPU.
        snapshot_bytes: All snapshots of the run.
        checkpoint_bytes: Checkpoints that are kept.
        images_per_second: Speed in the measured steps.
    """

    num_images: int
    num_params: int
    flops: float
    state_bytes: int
    peak_bytes: int
    snapshot_bytes: int
    checkpoint_bytes: int
    images_per_second: float

    @property
    def seconds(self) -> float:
        """Time of the run on one such machine, in seconds."""
        return self.num_images / self.images_per_second

    def describe(self, machines: int = 1) -> str:
        """Describe the cost in a few lines.

        Args:
            machines: Number of machines to estimate for, at least 1. Communication is not counted.
        """
        if machines < 1:
            raise ValueError(f"machines {machines} must be at least 1")
        lines = [
            f"parameters   {self.num_params:,}",
            f"Gflops       {self.flops / 1e9:.4g} a forward pass of one image, multiply-accumulates",
            f"memory       {size_text(self.state_bytes)} for weights, gradients, optimiser and averages; "
            f"{size_text(self.peak_bytes)} at most in the measured steps",
            f"storage      {size_text(self.snapshot_bytes)} of snapshots, "
            f"{size_text(self.checkpoint_bytes)} of checkpoints",
            f"speed        {self.images_per_second:,.1f} images/s here, "
            f"{_PASSES * 2 * self.flops * self.images_per_second / 1e12:.3g} Tflop/s of the network",
            f"time         {time_text(self.seconds)} for {self.num_images:,} images here",
        ]
        if machines > 1:
            lines.append(
                f"             {time_text(self.seconds / machines)} on {machines} such machines, if communication "
                "costs nothing"
            )
        return "\n".join(lines)


def dry_run(config: TrainConfig, *, steps: int = 5, dataset: ImageDataset | None = None) -> DryRun:
    """Measure a few steps of a run in a temporary folder, and keep nothing.

    Args:
        config: All settings.
        steps: Measured steps, at least 1, after two warm-up steps.
        dataset: Training images. Default: the data that the configuration names.

    Raises:
        ValueError: If settings or data are invalid, as in `edm2.train.train`.
    """
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    dataset = open_training_data(config) if dataset is None else dataset
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=faster_dtype(config, dataset))
    with tempfile.TemporaryDirectory() as folder:
        # A run may be shorter than the measurement.
        longer = max(config.num_images, (_WARMUP_STEPS + steps) * config.batch_size)
        settings = dataclasses.replace(config, num_images=longer)
        trainer = Trainer(settings, dataset, Path(folder) / "run")
        for _ in range(_WARMUP_STEPS):
            trainer.step()
        _wait(trainer.device)
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        _wait(trainer.device)
        seconds = time.perf_counter() - start
        peak = peak_bytes(trainer.device)
        flops = _flops(trainer)
    return costs(
        config,
        num_params=sum(p.numel() for p in trainer.denoiser.parameters()),
        flops=flops,
        peak_bytes=peak,
        images_per_second=steps * config.batch_size / seconds,
    )


def faster_dtype(config: TrainConfig, dataset: ImageDataset) -> Literal["float32", "bfloat16"]:
    """Measure a few steps in float32 and bfloat16 and return the faster; float32 if bfloat16 gains less than 5%.

    Args:
        config: All settings.
        dataset: Training images.

    Raises:
        ValueError: As in `dry_run`.
    """
    some = Subset(dataset, np.arange(min(len(dataset), max(_DTYPE_IMAGES, config.batch_size))))
    config = dataclasses.replace(config, validation=None, keep_best=0, stop_when_flat=0)
    float32, bfloat16 = (
        dry_run(dataclasses.replace(config, dtype=dtype), dataset=some).images_per_second
        for dtype in ("float32", "bfloat16")
    )
    return "bfloat16" if bfloat16 > _DTYPE_GAIN * float32 else "float32"


def costs(
    config: TrainConfig, *, num_params: int, flops: float, peak_bytes: int, images_per_second: float
) -> DryRun:
    """Cost of a run of a known network and speed; the arguments are those of `DryRun`."""
    tracks = len(config.ema.sigma_rels)
    averages = memory_bytes(num_params, tracks, updates=config.num_steps)
    times = math.ceil(config.num_images / config.snapshot_interval)
    kept = min(config.keep_checkpoints, math.ceil(config.num_images / config.checkpoint_images))
    return DryRun(
        num_images=config.num_images,
        num_params=num_params,
        flops=flops,
        state_bytes=4 * num_params * _FLOAT_BYTES + averages,
        peak_bytes=peak_bytes,
        snapshot_bytes=times * tracks * num_params * _STORED_BYTES[config.ema.dtype],
        checkpoint_bytes=kept * (3 * num_params * _FLOAT_BYTES + averages),
        images_per_second=images_per_second,
    )


def _flops(trainer: Trainer) -> float:
    denoiser = trainer.denoiser
    shape = (1, *denoiser.img_shape)
    labels = torch.zeros(1, denoiser.label_dim, device=trainer.device) if denoiser.label_dim else None
    image, sigma = torch.zeros(shape, device=trainer.device), torch.ones(1, device=trainer.device)
    channels = denoiser.cond_channels
    condition = torch.zeros(1, channels, *shape[2:], device=trainer.device) if channels else None
    return float(count_flops(denoiser.eval(), image, sigma, labels, condition=condition))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
