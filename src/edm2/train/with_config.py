"""Training settings of the configurations A to F, derived from those of config G.

Ref: EDM2 Table 1, App. B.
"""

import dataclasses
from typing import Any, cast

from edm2.ema import Target
from edm2.train.config import TrainConfig
from edm2.train.rules import training_rules


def traditional_average() -> Target:
    """Config A's average, for `edm2.ema.reconstruct(snapshots, target=...)` of a run whose clock counts images.

    Its half-life is a twentieth of the images seen, at most 50 million. Up to 1,000 million images it is a power
    function, t^gamma with gamma + 1 = ln 2 / 0.05, the same as EMA length 0.0629.
    `edm2.train.traditional_decay` gives the factor of a single update.

    Ref: EDM2 App. B.1; EDM (arXiv 2206.00364) App. F.2.
    """
    return Target.exponential(training_rules("A").ema_halflife_mimg * 1e6, rampup_ratio=0.05)


def with_config(settings: TrainConfig, config: str) -> TrainConfig:
    """The same run with another configuration.

    The learning rate changes by the ratio of the paper's rates and decays where the paper's does. Adam's betas and
    eps, the factor on the loss, and config A's noise distribution are the paper's. Where the settings have G's
    dropout, 0, the others get theirs, 0.1. Lengths, batch size, network size, given attention resolutions and seeds
    stay the same.

    Args:
        settings: Settings of config G.
        config: `A` to `G`; G returns the settings unchanged.

    Returns:
        The settings of that configuration.

    Raises:
        ValueError: If there is no such configuration, or the settings are not those of config G.
    """
    if settings.config != "G":
        raise ValueError(
            f"these settings are of config {settings.config}: start from the settings of G, from which "
            "the learning rates of the others are scaled"
        )
    rules, published = training_rules(config), training_rules("G")
    if config == "G":
        return settings
    optimizer = dataclasses.replace(
        settings.optimizer,
        ref_lr=settings.optimizer.ref_lr * (rules.ref_lr / published.ref_lr),
        ref_batches=settings.optimizer.ref_batches if rules.ref_batches else 0,
        betas=rules.betas,
        # The paper never undoes its factor on the loss. Ours is undone on the gradients; dividing epsilon by it makes
        # Adam's updates the same.
        eps=rules.eps / rules.loss_scaling,
    )
    loss = settings.loss
    if (rules.p_mean, rules.p_std) != (published.p_mean, published.p_std):
        loss = dataclasses.replace(loss, p_mean=rules.p_mean, p_std=rules.p_std)
    network = settings.network
    if network.dropout == 0:
        network = dataclasses.replace(network, dropout=None)
    return dataclasses.replace(
        settings,
        config=cast(Any, rules.config),
        loss_scaling=rules.loss_scaling,
        network=network,
        optimizer=optimizer,
        loss=loss,
    )
