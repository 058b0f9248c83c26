"""Loss on held-out images: at fixed noise levels and with fixed noise, of the raw weights and of an average."""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2.data import Batch, ImageDataset, Subset
from edm2.diffusion import Denoiser
from edm2.ema import PowerEMA
from edm2.files import write_sealed
from edm2.nn import keyed_uniform
from edm2.train.build import open_alike
from edm2.train.coding import Coding
from edm2.train.config import TrainConfig
from edm2.train.inputs import code_batch
from edm2.train.objectives import Objective, ValidatedObjective
from edm2.train.residual import Residual
from edm2.train.world import World

SPLIT_FILE = "validation.json"
_STREAM = 33  # of keyed random numbers, for the split


def split_data(dataset: ImageDataset, config: TrainConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """Training images and held-out ones.

    A share of the training images is chosen by the seed. Another data set leaves the training images as they are.

    Raises:
        ValueError: If the share leaves nothing on one side, or the other data set does not fit.
    """
    if config.validation is None:
        return dataset, None
    share = config.validation_share
    if share is None:
        held_out = open_alike(
            config, str(config.validation), condition=config.validate.condition, verify=config.verify_data
        )
        _check_alike(dataset, held_out)
        return dataset, held_out
    rows = held_out_rows(len(dataset), share, config.seed)
    rest = np.setdiff1d(np.arange(len(dataset)), rows)
    if not len(rows) or not len(rest):
        raise ValueError(
            f"validation {share:g} of {len(dataset)} images leaves {len(rest)} for training and {len(rows)} held out: "
            "choose another share"
        )
    return Subset(dataset, rest), Subset(dataset, rows)


def held_out_rows(size: int, share: float, seed: int) -> np.ndarray:
    """The images that a share of a data set holds out, ascending; a function of seed and size."""
    order = keyed_uniform(torch.arange(size), (), seed=seed, stream=_STREAM).argsort(stable=True)
    rows: np.ndarray = order[: round(size * share)].sort().values.numpy()
    return rows


def store_split(out: Path, held_out: ImageDataset, world: World) -> None:
    """Write down which of the run's images are held out, by number and name."""
    if world.is_first and isinstance(held_out, Subset) and not (out / SPLIT_FILE).exists():
        names = [held_out.image_name(i) for i in range(len(held_out))]
        write_sealed(out / SPLIT_FILE, {"rows": held_out.rows.tolist(), "names": names})


def _check_alike(dataset: ImageDataset, held_out: ImageDataset) -> None:
    def shape(data: ImageDataset) -> dict[str, Any]:
        given = data.conditions
        return {
            "images": (data.image_shape, str(data.dtype)),
            "conditions": None if given is None else (given.image_shape, str(given.dtype)),
            "vectors": data.vector_dim,
        }

    ours, theirs = shape(dataset), shape(held_out)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"the {name} of the validation data {held_out.name!r} are {theirs[name]}, those of the training data "
                f"{value}: convert them first"
            )
    if bool(dataset.num_classes) != bool(held_out.num_classes) or held_out.num_classes > dataset.num_classes:
        raise ValueError(
            f"the validation data {held_out.name!r} has {held_out.num_classes} classes, the training data "
            f"{dataset.num_classes}: give data with the same classes"
        )


class Validation:
    """Measures the loss of a run on held-out images.

    Each image is measured at every level of the objective, with noise that depends on seed, image and level alone, so
    that the curve shows the network and not the noise. No dropout, no augmentation; labels as they are.

    Args:
        config: All settings.
        held_out: Images that training does not see.
        coding: Conversion of stored values to network inputs.
        objective: What the network is trained for.
        residual: Regression whose residuals are modelled; None for images.

    Raises:
        ValueError: If the objective cannot be validated.
    """

    def __init__(
        self,
        config: TrainConfig,
        held_out: ImageDataset,
        coding: Coding,
        objective: Objective,
        residual: Residual | None = None,
    ) -> None:
        if not isinstance(objective, ValidatedObjective):
            raise ValueError(
                f"{type(objective).__name__} has no loss on held-out images: leave --validation out"
            )
        self._config, self._held_out, self._coding, self._objective = config, held_out, coding, objective
        self.levels = objective.levels
        self._residual = residual
        self.count = min(len(held_out), config.validate.most)

    def measure(self, denoiser: Denoiser, ema: PowerEMA, sigma_rel: float) -> dict[str, Any]:
        """Measure raw weights and an average; both are restored bit for bit.

        Args:
            denoiser: The network in training mode. If it is sharded, all processes call this together.
            ema: Its averages.
            sigma_rel: Which of them.

        Returns:
            `loss` and `loss_ema`, means over all levels, and the losses at each of the `levels`.
        """
        raw = self._losses(denoiser)
        with ema.applied(denoiser, sigma_rel):
            average = self._losses(denoiser)
        return {
            "loss": statistics.fmean(raw),
            "loss_ema": statistics.fmean(average),
            "sigma_rel": sigma_rel,
            "levels": list(self.levels),
            "by_level": raw,
            "by_level_ema": average,
        }

    @torch.no_grad()
    def _losses(self, denoiser: Denoiser) -> list[float]:
        device = next(denoiser.parameters()).device
        sums = torch.zeros(len(self.levels), dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        denoiser.eval()
        try:
            for stored in self._batches():
                batch = code_batch(stored, self._coding, seed=self._config.seed, num_images=0, device=device)
                if self._residual is not None:
                    batch = self._residual.subtract(batch)
                known = torch.ones_like(batch.images, dtype=torch.bool) if batch.mask is None else batch.mask
                count += known.sum()
                for i in range(len(self.levels)):
                    loss = self._objective.validation_loss(denoiser, batch, i)
                    sums[i] += torch.where(known, loss, 0.0).sum(dtype=torch.float64)
        finally:
            denoiser.train()
        return [total / max(float(count), 1.0) for total in sums.tolist()]

    def _batches(self) -> Iterator[Batch]:
        data, size = self._held_out, self._config.microbatch or self._config.batch_size
        for start in range(0, self.count, size):
            rows = np.arange(start, min(start + size, self.count))
            yield Batch.read(data, rows, start)


def best_moments(records: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Images seen at the moments with the lowest loss of the average, best first."""
    finite = [r for r in records if math.isfinite(r["loss_ema"])]
    return [r["num_images"] for r in sorted(finite, key=lambda r: r["loss_ema"])[:count]]


def has_ended(records: Sequence[dict[str, Any]], config: TrainConfig) -> bool:
    """Whether the settings say that a run ends after these measurements."""
    options = config.validate
    return config.stop_when_flat > 0 and is_flat(
        [record["loss_ema"] for record in records],
        patience=config.stop_when_flat,
        change=options.min_change,
        window=options.window,
    )


def is_flat(losses: Sequence[float], *, patience: int, change: float, window: int) -> bool:
    """Whether a loss has stopped falling.

    Args:
        losses: Losses of all measurements so far.
        patience: Number of last measurements among which none may bring a new lowest value.
        change: Share by which a value must lie below the lowest one before it to count as new.
        window: Measurements in the running mean that is looked at.
    """
    means = [statistics.fmean(losses[max(i + 1 - window, 0) : i + 1]) for i in range(window - 1, len(losses))]
    lowest, since = math.inf, 0
    for mean in means:
        if lowest == math.inf or mean < lowest - change * abs(lowest):
            lowest, since = mean, 0
        else:
            since += 1
    return since >= patience
