"""`edm2 distill`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from edm2.commands.common import take_option
from edm2.commands.train import train_or_stop
from edm2.distill import describe_teacher, distill, open_teacher, student_settings
from edm2.progress import tell
from edm2.train import ConsistencyConfig, TrainConfig
from edm2.train.loggers import open_loggers


@dataclass(kw_only=True)
class _Distill:
    """Turn a diffusion model into one that makes images in one to four evaluations, by consistency tuning.

    The student starts from the teacher's weights. A teacher that `edm2 tune` gave a guide is followed with its
    guidance, and the student needs none. Interrupted runs resume: run the same command again.
    """

    teacher: Annotated[Path, tyro.conf.Positional]
    """Run, model file, folder of `save_pretrained`, or NAME.json of `edm2 import`. A run is opened with its tuned
    settings."""
    out: Path
    """Folder of the student's run."""
    ema: float | None = None
    """EMA length of the teacher, reconstructed from its run's snapshots, without a guide. Default: the tuned one."""
    guided: bool = True
    """Whether to use the guide of tuned or published settings."""
    log_to: tuple[str, ...] = ()
    """Also log to tensorboard, wandb or trackio; several may be given."""
    consistency: ConsistencyConfig
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 distill`."""
    free: Any = _Distill(
        teacher=tyro.MISSING, out=tyro.MISSING, consistency=ConsistencyConfig(), config=TrainConfig()
    )
    chosen = tyro.cli(_Distill, prog=prog, args=list(words), default=free)
    teacher = open_teacher(chosen.teacher, chosen.ema, guided=chosen.guided)
    # The defaults of most options are the teacher's, or follow from the length of the run.
    images = take_option("--images", list(words))[0]
    config = student_settings(
        teacher, chosen.teacher, num_images=None if images is None else chosen.config.num_images
    )
    assert config.consistency is not None
    default = dataclasses.replace(chosen, consistency=config.consistency, config=config)
    chosen = tyro.cli(_Distill, prog=prog, args=list(words), default=default)
    for option in ("network", "config", "network_from"):
        if getattr(chosen.config, option) != getattr(config, option):
            raise ValueError(
                f"the student has the teacher's network: leave --{option.replace('_', '-')} and its options out"
            )
    guide = "" if teacher.guide is None else f", guidance {teacher.sampling.guidance:g}"
    tell(f"edm2: teacher {describe_teacher(teacher)}{guide}")
    loggers = open_loggers(chosen.log_to)
    settings = dataclasses.replace(chosen.config, consistency=chosen.consistency)
    train_or_stop(lambda: distill(teacher, chosen.out, settings, loggers=loggers), chosen.out)
