"""A few-step generator from a diffusion model: opens the teacher, chooses settings, tunes it for consistency."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edm2.data import ImageDataset
from edm2.diffusion import Denoiser
from edm2.hub import Pretrained, open_pretrained
from edm2.train import (
    ConsistencyConfig,
    EMAConfig,
    LossConfig,
    NetworkConfig,
    TrainConfig,
    Trainer,
    learning_rate,
    train,
)
from edm2.train.consistency import Teacher
from edm2.train.loggers import Logger
from edm2.train.run_folder import CHECKPOINTS, CONFIG_FILE
from edm2.train.settings_file import run_settings

_BATCH = 128  # for a model file, which says nothing about its training
_HIGHEST = 80.0  # noise level from which diffusion models make images
# Of 1,000 levels drawn in training, 27 are below the lowest and 27 above the first level of the student.
_LOWEST, _TAIL = 0.045, 1.93


def open_teacher(path: str | Path, sigma_rel: float | None = None, *, guided: bool = True) -> Pretrained:
    """Open the model that a student starts from.

    Args:
        path: A run (with the settings that `edm2 tune` found, if it was tuned), a model file, a folder of
            `save_pretrained`, or the settings of a released model.
        sigma_rel: EMA length to reconstruct from a run's snapshots instead; it is not guided.
        guided: Whether to keep the guide of tuned or published settings.

    Raises:
        ValueError: If the model is a student itself or has to do with a regression, or as in
            `edm2.hub.open_pretrained`.
    """
    teacher = open_pretrained(path, sigma_rel)
    if "consistency" in teacher.generator.info:
        raise ValueError(
            f"{path} is a student already: give its teacher, the diffusion model that it was made from"
        )
    if teacher.generator.info.get("objective") == "mean" or "residual" in teacher.generator.info:
        raise ValueError(
            f"{path} is a regression or a residual model: give a diffusion model of the images themselves"
        )
    return teacher if guided else Pretrained(teacher.generator)


def student_settings(teacher: Pretrained, path: str | Path, *, num_images: int | None = None) -> TrainConfig:
    """Return the default settings for a student of a teacher.

    The data and their coding, the network and the number of images are those of the teacher's run. A model file names
    no data.

    Args:
        teacher: What `open_teacher` returned.
        path: Where it was opened.
        num_images: Length of the run, to which intervals and rates are adapted. Default: as many as the teacher saw.
    """
    path = Path(path)
    is_run = (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS).is_dir()
    base = run_settings(path) if is_run else _settings_of_file(teacher)
    seen = num_images or int(teacher.generator.info.get("num_images") or base.num_images)
    batch = base.batch_size
    low, high = math.log(_LOWEST), math.log(first_level(teacher.generator.denoiser))
    images = max(seen - seen % batch, batch)
    rate = learning_rate(
        base.num_images,
        batch_size=batch,
        ref_lr=base.optimizer.ref_lr,
        ref_batches=base.optimizer.ref_batches,
        rampup_mimg=0,
    )
    return dataclasses.replace(
        base,
        num_images=images,
        dtype="float32",  # bfloat16 rounds off what differs between the points of a close pair
        snapshot_images=None,
        checkpoint_images=max(images // 8, batch),
        log_images=max(images // 64, batch),
        optimizer=dataclasses.replace(
            base.optimizer, ref_lr=rate / 2, decay="cosine", rampup_mimg=batch * 16 / 1e6
        ),
        loss=dataclasses.replace(
            base.loss, p_mean=round((low + high) / 2, 2), p_std=round((high - low) / (2 * _TAIL), 2)
        ),
        ema=EMAConfig(),
        max_hours=None,
        init=None,
        validation=None,
        keep_best=0,
        stop_when_flat=0,
        consistency=ConsistencyConfig(path="data" if teacher.guide is None else "teacher"),
    )


def first_level(denoiser: Denoiser) -> float:
    """The noise level from which a student makes images: 2.5 times the norm of an image, but 10 to 80.

    Less noise leaves traces of an image's brightness and contrast: noise without an image has less variance there, and
    images made from it have too little contrast. Noise of 80 hides images of any size, but a student learns the levels
    between those that hide a small image and 80 last and badly.
    """
    norm = denoiser.sigma_data * math.sqrt(math.prod(denoiser.img_shape))
    return float(f"{min(max(2.5 * norm, 10.0), _HIGHEST):.3g}")


def describe_teacher(teacher: Pretrained) -> str:
    """Tell a teacher and its guide from others, in words."""
    words = []
    for part in filter(None, (teacher.generator, teacher.guide)):
        facts = part.identity()
        length = "" if facts["sigma_rel"] is None else f" with EMA {facts['sigma_rel']:g}"
        words.append(f"{facts['digest']}{length}")
    return " guided by ".join(words)


def distill(
    teacher: str | Path | Pretrained,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    dataset: ImageDataset | None = None,
    quiet: bool = False,
    on_step: Callable[[Trainer], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> Path:
    """Tune a diffusion model for consistency, or continue the run in the folder.

    Args:
        teacher: What `open_teacher` returns, or the path that it opens.
        out: Folder of the student's run.
        config: All settings, of which the network's are ignored: the student has the teacher's network. Default:
            `student_settings`; needed if the teacher is not given as a run.
        dataset: Training images. Default: those that the settings name.
        quiet: See `edm2.train.train`, as for the others.
        on_step: See `edm2.train.train`.
        loggers: See `edm2.train.train`.

    Returns:
        File of the student.

    Raises:
        ValueError: As in `open_teacher` and `edm2.train.train`.
        FloatingPointError: As in `edm2.train.train`.
        OSError: As in `edm2.train.train`.
        Stopped: As in `edm2.train.train`; the same call continues.
    """
    if not isinstance(teacher, Pretrained):
        path, teacher = teacher, open_teacher(teacher)
        config = student_settings(teacher, path) if config is None else config
    assert config is not None, "a teacher in memory has no settings"
    options = config.consistency or ConsistencyConfig()
    halving = options.halving_images or math.ceil(config.num_images / max(options.halvings, 1))
    low, high = teacher.sampling.interval or ConsistencyConfig.interval
    config = dataclasses.replace(
        config,
        consistency=dataclasses.replace(
            options,
            teacher=describe_teacher(teacher),
            halving_images=halving,
            guidance=teacher.sampling.guidance,
            interval=(low, min(high, _HIGHEST)),
            sigma_max=options.sigma_max or first_level(teacher.generator.denoiser),
        ),
    )
    return train(
        config,
        out,
        dataset=dataset,
        teacher=Teacher(
            teacher.generator.denoiser,
            teacher.generator.info,
            None if teacher.guide is None else teacher.guide.denoiser,
            {} if teacher.guide is None else teacher.guide.info,
        ),
        quiet=quiet,
        on_step=on_step,
        loggers=loggers,
    )


def _settings_of_file(teacher: Pretrained) -> TrainConfig:
    options = teacher.generator.denoiser.options
    names = {field.name for field in dataclasses.fields(NetworkConfig)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name in names
    }
    return TrainConfig(
        batch_size=_BATCH,
        config=options["config"],
        network=NetworkConfig(**given),
        network_from=options.get("network_from"),
        loss=LossConfig(sigma_data=options["sigma_data"]),
    )
