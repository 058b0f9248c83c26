"""The optimiser: Adam, or AdamW where weights decay.

Ref: Adam (arXiv 1412.6980); decoupled weight decay (arXiv 1711.05101).
"""

import torch
from torch import nn

from edm2.ema.tracking.sharding import is_sharded
from edm2.train.config_groups import OptimizerConfig


def make_optimizer(network: nn.Module, options: OptimizerConfig) -> torch.optim.Adam:
    """The optimiser of a network's weights, with rate 0 until one is set.

    Args:
        network: Its weights may be sharded.
        options: Betas, epsilon and weight decay, which weights of fewer than two dimensions are spared.
    """
    # One call of the fused optimiser takes either whole or sharded weights.
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for spread in (False, True):
        for p in network.parameters():
            if is_sharded(p) is spread:
                decay = options.weight_decay if p.ndim >= 2 else 0.0
                groups.setdefault((spread, decay), []).append(p)
    kind = torch.optim.AdamW if options.weight_decay else torch.optim.Adam
    return kind(
        [{"params": group, "weight_decay": decay} for (_, decay), group in groups.items()],
        lr=0.0,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )
