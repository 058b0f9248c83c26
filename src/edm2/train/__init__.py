"""Training: configuration, loop, schedule, checkpoints and log."""

from edm2.train.config import TrainConfig
from edm2.train.config_groups import (
    ConsistencyConfig,
    DataConfig,
    EMAConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
)
from edm2.train.loop import Trainer
from edm2.train.rules import TrainingRules, traditional_decay, training_rules
from edm2.train.schedule import learning_rate
from edm2.train.session import train
from edm2.train.settings_file import read_settings
from edm2.train.signals import Stopped

__all__ = [
    "ConsistencyConfig",
    "DataConfig",
    "EMAConfig",
    "LossConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingRules",
    "learning_rate",
    "read_settings",
    "traditional_decay",
    "train",
    "training_rules",
]
