"""Advice in words: each setting with what it follows from."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from edm2.advice.structure import Structure
from edm2.data import ImageDataset
from edm2.progress import time_text
from edm2.train.config import TrainConfig
from edm2.train.config_groups import OPTION_NAMES
from edm2.train.dry_run import DryRun
from edm2.train.memory import size_text

SUGGESTED = "suggested"
"""What a run with settings from here stores in place of a preset's name."""
_FEW_STEPS = 1000  # the preset `digits` takes 1,375
_SMALL_SIDE = 32
_FEW_IMAGES = 500  # 50 digits are copied, 1,438 are not


class Reason(NamedTuple):
    """Why some settings have their values.

    Attributes:
        settings: Names of the fields of `TrainConfig`, such as `network.model_channels`.
        why: What they follow from, and the source.
    """

    settings: tuple[str, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What `edm2.advice.suggest` found.

    Attributes:
        config: All settings.
        cost: Measured cost of the run.
        structure: What the spectrum of the data says.
        dataset: The images.
        memory: Bytes that a step may take; None for no limit.
    """

    config: TrainConfig
    cost: DryRun
    structure: Structure
    dataset: ImageDataset
    memory: float | None

    def reasons(self) -> list[Reason]:
        """Return the settings that are not defaults, each with its reason and source."""
        return [*self._network(), *self._length(), *self._noise(), *self._rest()]

    def headline(self) -> str:
        """Return one line about the images and the run."""
        channels, height, width = self.dataset.image_shape
        classes = f", {self.dataset.num_classes} classes" if self.dataset.num_classes else ""
        return (
            f"settings for {self.config.data}: {len(self.dataset):,} images, {height}x{width}, "
            f"{channels} channel{'s' * (channels > 1)}{classes}; {time_text(self.cost.seconds)} of training"
        )

    def describe(self) -> str:
        """Return the advice as options of `edm2 train` with their reasons, and what to know before the run starts."""
        lines = []
        for names, why in self.reasons():
            lines += [
                " ".join(f"--{_option(name)} {_words(self._value(name))}" for name in names),
                f"    {why}",
            ]
        return "\n".join([*lines, *(f"note: {text}" for text in self.remarks())])

    def to_toml(self) -> str:
        """Return a settings file for `edm2 train --settings`, with the reasons as comments."""
        lines = [f"data = {json.dumps(self.config.data)}"]
        if self.config.condition is not None:
            lines.append(f"condition = {json.dumps(self.config.condition)}")
        for names, why in self.reasons():
            lines += ["", f"# {why}"]
            lines += [f"{name} = {json.dumps(self._value(name))}" for name in names]
        return "\n".join([*lines, "", *(f"# note: {text}" for text in self.remarks())]).rstrip() + "\n"

    def _value(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.config)

    def _network(self) -> Iterator[Reason]:
        network = self.config.network
        names = ["model_channels", "channel_mult", "num_blocks", "channels_per_head"]
        names += [] if network.attn_resolutions is None else ["attn_resolutions"]
        yield Reason(
            tuple(f"network.{name}" for name in names),
            f"{self.cost.num_params:,} parameters: time divides between network and length as in two runs that worked, "
            "the preset digits and EDM2-XXL (Table 6)",
        )
        if self.config.dataset.pad_to:
            yield Reason(("dataset.pad_to",), "every level of the network halves the side")
        if self.config.dataset.resample:
            yield Reason(("dataset.resample",), "conditions are of another size than the images")

    def _length(self) -> Iterator[Reason]:
        config, cost, steps = self.config, self.cost, self.config.num_steps
        speed = (
            f"{cost.images_per_second:,.0f}"
            if cost.images_per_second >= 10
            else f"{cost.images_per_second:.2g}"
        )
        yield Reason(
            ("num_images",),
            f"{time_text(cost.seconds)} at {speed} images/s, measured here; each image is seen "
            f"{self._passes:,.0f} times",
        )
        split = config.microbatch is not None
        yield Reason(
            ("batch_size", *(["microbatch"] if split else [])),
            f"{steps:,} steps; between 32 (digits) and 2048 (EDM2) by the length of the run"
            + (f"; divided to fit into {size_text(self.memory or 0)}" if split else ""),
        )
        yield Reason(
            ("optimizer.ref_lr",),
            f"0.136 / sqrt({config.network.model_channels} channels), within 6% of every rate in EDM2 Table 6",
        )
        yield Reason(
            ("optimizer.ref_batches", "optimizer.rampup_mimg"),
            "the rate falls after a tenth of the run (digits 11%, EDM2 7% to 16%), and rises in a short ramp, by the "
            "length of the run",
        )

    def _noise(self) -> Iterator[Reason]:
        found = self.structure
        levels = f"ln sigma {found.center:.2f} +- {found.width:.2f}"
        yield Reason(
            ("loss.p_mean", "loss.p_std"),
            f"the spectrum of {found.num_images:,} images helps a linear denoiser at {levels}; shapes are finer, so "
            "0.3 lower (EDM2: -0.8 +- 1.6 at 64x64)"
            if found.explained is None
            else f"a linear function of the condition explains {100 * found.explained:.0f}% of the variance of "
            f"{found.num_images:,} images; noise stops hiding the rest at {levels}",
        )

        if self.config.sigma_max != TrainConfig.sigma_max:
            yield Reason(
                ("sigma_max",),
                f"samples start where noise hides the strongest pattern, of standard deviation {found.strongest:.0f}; "
                "EDM's 80 is 4.5 times that of photographs of 64x64",
            )

    def _rest(self) -> Iterator[Reason]:
        config = self.config
        regularised = ("dataset.augment",) * bool(config.dataset.augment) + ("network.dropout",) * bool(
            config.network.dropout
        )
        if regularised:
            yield Reason(
                regularised,
                f"{self._passes:,.0f} passes over the images: EDM used augmentation and dropout for 2,857 to 12,700 "
                "passes (CIFAR-10, FFHQ, AFHQv2), EDM2 neither for its XS's 840 over ImageNet",
            )
        yield Reason(
            ("snapshot_images", "ema.dtype"),
            f"ten moments of {len(config.ema.sigma_rels)} averages, {size_text(self.cost.snapshot_bytes)}: any EMA "
            "length at each of them, and guides from the run's own past",
        )
        yield Reason(
            ("checkpoint_images", "log_images"), "a checkpoint every ten minutes, a hundred lines of the log"
        )
        yield Reason(("dtype",), "bfloat16 on GPUs; on CPUs the faster one, measured here")

    @property
    def _passes(self) -> float:
        return self.config.num_images / len(self.dataset)

    @property
    def is_too_large(self) -> bool:
        """Whether the pictures are too large for so short a run."""
        return self.config.num_steps < _FEW_STEPS and min(self.dataset.image_shape[1:]) > _SMALL_SIDE

    def remarks(self) -> list[str]:
        """Return what to know before the run starts, in sentences."""
        config, remarks = self.config, []
        _, height, width = self.dataset.image_shape
        if config.num_steps < _FEW_STEPS:
            smaller = ", or use smaller images (edm2 data convert --size 32)" if self.is_too_large else ""
            remarks.append(
                f"{config.num_steps:,} steps are few for images of {height}x{width}, so samples will be rough: give "
                f"more --hours{smaller}"
            )
        if len(self.dataset) < _FEW_IMAGES:
            remarks.append(f"{len(self.dataset):,} images are few: the network may copy some of them")
        return remarks


def _option(name: str) -> str:
    return OPTION_NAMES.get(name, name).replace("_", "-")


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
