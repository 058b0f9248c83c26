"""Settings for a data set and the time at hand, each with its reason."""

import dataclasses
import functools
import math
from typing import Literal

import torch

from edm2.advice import scaling
from edm2.advice.memory import activation_bytes, fitting_images, step_bytes
from edm2.advice.reasons import Advice
from edm2.advice.structure import measure_structure
from edm2.data import ImageDataset, PaddedDataset, measure_coding
from edm2.diffusion import Denoiser, build_denoiser
from edm2.nn import count_flops
from edm2.progress import Progress
from edm2.train.build import pick_device
from edm2.train.config import TrainConfig
from edm2.train.config_groups import DataConfig, EMAConfig, LossConfig, OptimizerConfig
from edm2.train.dry_run import DryRun, costs, dry_run
from edm2.train.memory import size_text

DEFAULT_HOURS = {"cpu": 0.25, "cuda": 2.0}
_Shape = tuple[int, int]
_Precision = Literal["float32", "bfloat16"]
_PROBE: _Shape = (32, 1)  # whose speed is measured first
_PROBE_BATCH, _PROBE_PIXELS, _MEASURED_STEPS = 32, 32 * 32 * 32, 3
_GAINS: dict[_Precision, float] = {"float32": 1.0, "bfloat16": 1.15}  # gain that is worth bfloat16's rounding
# EDM trained CIFAR-10, FFHQ and AFHQv2 for 2,857 to 12,700 passes, all augmented; ImageNet for 1,600 without.
_MOST_PASSES, _AUGMENT_FROM, _DROPOUT_FROM = 4000, 200, 1000
_AUGMENT, _DROPOUT = 0.12, 0.1
# A linear denoiser sees spectra only; edges and shapes can be told from weaker noise.
_BELOW_LINEAR = 0.3
_P_STD_RANGE = (0.9, 2.0)
# With conditions, the network also learns what noise hides from the condition alone, at all higher levels.
_P_STD_RANGE_GIVEN = (1.2, 2.0)
_ABOVE_STRONGEST = 4.5  # EDM's 80 is this many times the strongest pattern of photographs of 64x64
_SNAPSHOTS, _LOG_LINES = 10, 100
_CHECKPOINT_SECONDS = 600


def suggest(
    dataset: ImageDataset,
    *,
    data: str,
    condition: str | None = None,
    hours: float | None = None,
    memory: float | None = None,
    device: str = "auto",
    options: DataConfig | None = None,
    quiet: bool = False,
) -> Advice:
    """Suggest settings for training on a data set, on this machine.

    A few steps are measured. The compute that the hours give is divided between the size of the network and the length
    of the run. Everything that depends on the length follows from it, and the noise levels from the data's spectrum.

    Args:
        dataset: Training images, without padding.
        data: Their name for `TrainConfig.data`.
        condition: Name of their conditions for `TrainConfig.condition`, if these are stored separately.
        hours: Time to train. Default: a quarter of an hour on a CPU, 2 hours on a GPU.
        memory: Bytes that a step may take. Default: what a GPU has free; no limit on a CPU.
        device: Where the run will be.
        options: How images are read; padding, and resampling of conditions, are chosen here.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If hours or memory are out of range, the images cannot be trained on, or nothing fits into the
            memory.
    """
    for name, value in (("hours", hours), ("memory", memory)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} {value} must be above 0 and finite")
    where = pick_device(device)
    if hours is None:
        hours = DEFAULT_HOURS.get(where.type, DEFAULT_HOURS["cpu"])
    if memory is None and where.type == "cuda":
        memory = float(torch.cuda.mem_get_info(where)[0])
    with Progress("measuring", 4, "parts", quiet=quiet) as progress:
        work = _Work(
            dataset,
            TrainConfig(data=data, condition=condition, device=device),
            options or DataConfig(),
            memory,
        )
        progress.advance(1)
        shape, cost = work.choose(hours * 3600, progress)
        return work.advice(shape, cost, hours * 3600)


class _Work:
    """A data set with what was measured on it."""

    def __init__(
        self, dataset: ImageDataset, base: TrainConfig, options: DataConfig, memory: float | None
    ) -> None:
        self.levels = scaling.levels_for(*dataset.image_shape[1:])
        if options.crop and self.levels.pad_to:
            raise ValueError(
                f"crop {options.crop} cannot be halved often enough: choose another --dataset.crop, such as "
                f"{self.levels.pad_to}"
            )
        pad_to = options.pad_to or self.levels.pad_to
        if pad_to and not options.crop:  # a crop is cut out of padded images
            dataset = PaddedDataset(dataset, pad_to)
            self.levels = scaling.levels_for(pad_to, pad_to)
        self.dataset, self.memory, self.structure = dataset, memory, measure_structure(dataset)
        given = dataset.conditions
        if given is not None and given.image_shape[1:] != dataset.image_shape[1:] and not options.resample:
            options = dataclasses.replace(options, resample="bicubic")
        options = dataclasses.replace(options, pad_to=pad_to or None)
        self.base = dataclasses.replace(base, dataset=options, ema=EMAConfig(dtype="fp16"))
        on_gpu = pick_device(base.device).type == "cuda"
        self.dtypes: tuple[_Precision, ...] = ("bfloat16",) if on_gpu else ("float32", "bfloat16")
        self.denoiser = functools.cache(self._denoiser)
        self.macs = functools.cache(self._macs)
        self.sizes = functools.cache(self._sizes)

    def _denoiser(self, shape: _Shape) -> Denoiser:
        """Network of a shape, on the meta device."""
        channels, height, width = self.dataset.image_shape
        network = scaling.network_for(self.levels, shape)
        with torch.device("meta"):
            return build_denoiser((height, width), channels, self.dataset.num_classes, **vars(network))

    def _macs(self, shape: _Shape) -> float:
        """Multiply-accumulates of a forward pass of one image."""
        denoiser = self.denoiser(shape).eval()
        labels = torch.zeros(1, denoiser.label_dim, device="meta") if denoiser.label_dim else None
        image = torch.zeros((1, *denoiser.img_shape), device="meta")
        return float(count_flops(denoiser, image, torch.ones(1, device="meta"), labels))

    def choose(self, seconds: float, progress: Progress) -> tuple[_Shape, DryRun]:
        """Find the shape for a time, from measured speeds, and its cost; sets `base.dtype` to the faster precision."""
        _, height, width = self.dataset.image_shape
        batch = max(1, min(_PROBE_BATCH, _PROBE_PIXELS // (height * width)))
        shape = self.fitting(_PROBE)
        costs = {dtype: self.measure(shape, dtype, batch) for dtype in self.dtypes}
        speeds = {dtype: cost.images_per_second / _GAINS[dtype] for dtype, cost in costs.items()}
        dtype = max(speeds, key=speeds.__getitem__)
        self.base, cost = dataclasses.replace(self.base, dtype=dtype), costs[dtype]
        progress.advance(1)
        for _ in range(2):
            budget = scaling.PASSES * self.macs(shape) * cost.images_per_second * seconds
            images = scaling.run_length(budget)
            wanted = self.fitting(scaling.nearest_shape(budget / (scaling.PASSES * images), self.macs))
            if wanted != shape:
                shape = wanted
                cost = self.measure(shape, dtype, scaling.batch_size(images))
            progress.advance(1)
        return shape, cost

    def fitting(self, shape: _Shape) -> _Shape:
        """The shape, or the largest smaller one of which a step of one image fits into the memory."""
        smaller = scaling.SHAPES[: scaling.SHAPES.index(shape) + 1]
        return next((s for s in reversed(smaller) if self.images_that_fit(s, self.base)), smaller[0])

    def measure(self, shape: _Shape, dtype: _Precision, batch: int) -> DryRun:
        """Measure a few steps.

        Raises:
            ValueError: If not one image fits into the memory.
        """
        measured = measure_coding(self.dataset, sample=self.structure.num_images)
        config = self.with_microbatch(
            dataclasses.replace(
                self.base,
                dtype=dtype,
                batch_size=batch,
                num_images=1 << 20,
                network=scaling.network_for(self.levels, shape),
                # Given here, because measuring it on all images would take longer than the steps.
                dataset=dataclasses.replace(
                    self.base.dataset, coding="fixed", mean=measured.mean, std=measured.std
                ),
            ),
            shape,
        )
        return dry_run(config, steps=_MEASURED_STEPS, dataset=self.dataset)

    def images_that_fit(self, shape: _Shape, config: TrainConfig) -> int:
        """Images per forward pass that fit into the memory, up to the batch; 0 for none."""
        if self.memory is None:
            return config.batch_size
        return fitting_images(config, *self.sizes(shape), self.memory)

    def _sizes(self, shape: _Shape) -> tuple[int, int]:
        """Number of parameters, and bytes that an image keeps for the backward pass."""
        denoiser = self.denoiser(shape)
        return sum(p.numel() for p in denoiser.parameters()), activation_bytes(denoiser)

    def with_microbatch(self, config: TrainConfig, shape: _Shape) -> TrainConfig:
        """Split the batch if the memory asks for it."""
        images = self.images_that_fit(shape, config)
        if not images:
            needed = size_text(step_bytes(config, *self.sizes(shape), images=1))
            raise ValueError(
                f"the smallest network needs {needed} for one image of {self.dataset.image_shape}, above the memory of "
                f"{size_text(self.memory or 0)}: use smaller images"
            )
        return config if images == config.batch_size else dataclasses.replace(config, microbatch=images)

    def advice(self, shape: _Shape, cost: DryRun, seconds: float) -> Advice:
        """All settings, for the shape and the speed that were found."""
        total = len(self.dataset)
        images = min(cost.images_per_second * seconds, _MOST_PASSES * total)
        batch = scaling.batch_size(images)
        # Snapshots then lie at whole tenths of the run.
        every = batch * max(1, round(images / (_SNAPSHOTS * batch)))
        images = _SNAPSHOTS * every
        passes = images / total
        structure, width = self.structure, shape[0]
        alone = structure.explained is None
        low, high = _P_STD_RANGE if alone else _P_STD_RANGE_GIVEN
        config = self.with_microbatch(
            dataclasses.replace(
                self.base,
                num_images=images,
                batch_size=batch,
                snapshot_images=every,
                checkpoint_images=_multiple(
                    min(images / 4, cost.images_per_second * _CHECKPOINT_SECONDS), batch
                ),
                log_images=_multiple(images / _LOG_LINES, batch),
                dataset=dataclasses.replace(
                    self.base.dataset, augment=_AUGMENT if passes >= _AUGMENT_FROM else 0.0
                ),
                network=scaling.network_for(
                    self.levels, shape, dropout=_DROPOUT if passes >= _DROPOUT_FROM else 0.0
                ),
                optimizer=OptimizerConfig(
                    ref_lr=scaling.reference_rate(width),
                    ref_batches=float(max(1, round(scaling.DECAY_START * images / batch))),
                    rampup_mimg=float(f"{scaling.rampup_images(images) / 1e6:.2g}"),
                ),
                sigma_max=max(TrainConfig.sigma_max, float(f"{_ABOVE_STRONGEST * structure.strongest:.2g}")),
                loss=LossConfig(
                    p_mean=round(structure.center - (_BELOW_LINEAR if alone else 0.0), 1),
                    p_std=round(min(max(structure.width, low), high), 1),
                ),
            ),
            shape,
        )
        known = {
            name: getattr(cost, name) for name in ("num_params", "flops", "peak_bytes", "images_per_second")
        }
        return Advice(
            config=config,
            cost=costs(config, **known),
            structure=structure,
            dataset=self.dataset,
            memory=self.memory,
        )


def _multiple(images: float, batch: int) -> int:
    return batch * max(1, round(images / batch))
