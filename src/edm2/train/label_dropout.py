"""Images shown without their label, so that one network learns both to use and to miss it.

Ref: classifier-free guidance (arXiv 2207.12598), Algorithm 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edm2.nn import keyed_uniform

_STREAM = 32  # of keyed random numbers


def drop_labels(labels: Tensor, index: Tensor, *, num_classes: int, probability: float, seed: int) -> Tensor:
    """Replace some labels by zeros, as a function of (seed, position).

    Args:
        labels: `[B]` classes, or `[B, label_dim]` floats.
        index: `[B]` int64 positions of the images in the run.
        num_classes: Number of classes.
        probability: Probability of each label to be left out.
        seed: Seed of the run.

    Returns:
        `[B, label_dim]` float32, one-hot for classes; a row of zeros is a missing label.
    """
    known = labels if labels.is_floating_point() else one_hot(labels, num_classes).float()
    kept = keyed_uniform(index, (), seed=seed, stream=_STREAM) >= probability
    return torch.where(kept[:, None], known, 0.0)
