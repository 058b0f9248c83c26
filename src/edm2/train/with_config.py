"""Training settings of the configurations A to G, made from those of config G.

Ref: EDM2 Table 1, App. B; LADDER sections 3-10.
"""

import dataclasses
from typing import Any, cast

from edm2.ema import Target
from edm2.train.config import TrainConfig
from edm2.train.rules import training_rules


def traditional_average() -> Target:
    """Config A's average, for `edm2.ema.reconstruct(snapshots, target=...)` of a run whose clock counts images.

    It forgets with a half-life of a twentieth of the images seen, up to 50 M images. Up to 1000 M images it is a
    power function, t^gamma with gamma + 1 = ln 2 / 0.05, which `edm2 ema reconstruct RUN --sigma-rel 0.0629 --out
    FOLDER` gives.

    Ref: LADDER section 3; `edm2.train.traditional_decay` is the factor of its single updates.
    """
    return Target.exponential(training_rules("A").ema_halflife_mimg * 1e6, rampup_ratio=0.05)


def with_config(settings: TrainConfig, config: str) -> TrainConfig:
    """The same run with another configuration of the ladder.

    What the paper changes from one configuration to the next is changed: the learning rate by the ratio of the
    paper's rates, its decay where the paper has none; Adam's betas and eps and the factor on the loss are set to
    the paper's, as is config A's noise distribution. Where the settings have G's dropout, 0, the others get theirs,
    0.1. Lengths, batch, network size, the resolutions with attention where the settings name them, and seeds stay.
    For G nothing changes.

    Args:
        settings: of config G.
        config: `A` to `G`.

    Returns:
        The settings of that configuration.

    Raises:
        ValueError: for another name, or settings that are not of config G.
    """
    if settings.config != "G":
        raise ValueError(
            f"these settings are of config {settings.config}: start from those of G, whose learning rate "
            "the others are scaled from"
        )
    rules, published = training_rules(config), training_rules("G")
    if config == "G":
        return settings
    optimizer = dataclasses.replace(
        settings.optimizer,
        ref_lr=settings.optimizer.ref_lr * (rules.ref_lr / published.ref_lr),
        ref_batches=settings.optimizer.ref_batches if rules.ref_batches else 0,
        betas=rules.betas,
        # The paper never undoes its factor on the loss. Ours is undone on the gradients: an epsilon divided by it
        # makes Adam's updates the same.
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
