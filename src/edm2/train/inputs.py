"""From a batch as stored to a batch as the network takes it."""

from collections.abc import Callable

import torch
from torch import Tensor

from edm2.data import Batch
from edm2.train.coding import Coding
from edm2.train.objectives import TrainingBatch

# Most that a transformed mask may differ from 1 where all values that were interpolated are known.
_TOLERANCE = 1e-3

Transform = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From images to transformed ones and the labels that tell the network what was done, if any."""


def code_batch(
    batch: Batch,
    coding: Coding,
    *,
    seed: int,
    num_images: int,
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
) -> TrainingBatch:
    """Code a batch for the network.

    Args:
        batch: As stored.
        coding: Conversion of stored values to network inputs.
        seed: Seed of the run.
        num_images: Images seen before this step.
        device: Where the network computes.
        transform: Augmentation; images, their missing values and conditions are transformed as one image.

    Returns:
        The batch, on the device.
    """

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    index = torch.arange(batch.position, batch.position + len(batch.images), device=device)
    images = coding.encode(batch.images.to(device, non_blocking=True), index, seed=seed)
    parts = [images]
    if coding.missing:
        known = images.isfinite()
        parts = [torch.where(known, images, 0.0), known.float()]
    if coding.condition is not None:
        assert batch.conditions is not None
        parts.append(coding.condition.encode(batch.conditions.to(device, non_blocking=True)))
    augment_labels = None
    if transform is not None:
        whole, augment_labels = transform(torch.cat(parts, dim=1) if len(parts) > 1 else images)
        parts = list(whole.split([part.shape[1] for part in parts], dim=1))
    return TrainingBatch(
        images=parts[0],
        index=index,
        num_images=num_images,
        labels=coding.labels(moved(batch.labels), moved(batch.vectors)),
        condition=None if coding.condition is None else parts[-1],
        # Values that were interpolated from missing ones are missing, too.
        mask=(parts[1] - 1).abs() < _TOLERANCE if coding.missing else None,
        augment_labels=augment_labels,
    )
