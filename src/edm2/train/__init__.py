"""Training: configuration, loop, schedule, checkpoints and log."""

from edm2.train.schedule import learning_rate

__all__ = ["learning_rate"]
