"""What a run is made of before anything is written: images, their coding, a network and its objective."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edm2.data import ImageDataset
from edm2.diffusion import Denoiser
from edm2.train.build import check_given, make_denoiser
from edm2.train.checkpoint import newest
from edm2.train.coding import Coding, make_coding
from edm2.train.config import TrainConfig
from edm2.train.consistency import ConsistencyObjective, Teacher
from edm2.train.initial import carried_licence, identify_models, take_over
from edm2.train.objectives import Objective, make_objective
from edm2.train.residual import MEAN_FILE, shared_coding
from edm2.train.run_folder import CHECKPOINTS
from edm2.train.validation import split_data


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run.

    Attributes:
        dataset: Images to train on.
        held_out: Images to validate on; None without any.
        coding: Conversion of stored values to network inputs.
        models: What identifies the models that the settings name.
        denoiser: The network, with its first weights.
        objective: What it is trained for.
        info: What snapshots and models say about data, coding and training.
    """

    dataset: ImageDataset
    held_out: ImageDataset | None
    coding: Coding
    models: dict[str, Any]
    denoiser: Denoiser
    objective: Objective
    info: dict[str, Any]


def assemble(
    config: TrainConfig, dataset: ImageDataset, out: Path, *, preset: str, device: torch.device
) -> Assembly:
    """Make the parts that settings ask for.

    Args:
        config: All settings.
        dataset: All images.
        out: Folder of the run, which may hold what an earlier session kept.
        preset: Name of the preset behind the settings.
        device: Device of a teacher.

    Raises:
        ValueError: If settings, data and models do not fit each other.
    """
    dataset, held_out = split_data(dataset, config)
    teacher = None
    if config.consistency is not None:
        teacher = Teacher.load(out, device)
        teacher.check_data(dataset)
    coding = make_coding(config, dataset) if teacher is None else teacher.coding
    if config.residual is not None:
        kept = out / MEAN_FILE
        coding = shared_coding(kept if kept.exists() else config.residual, coding, dataset)
    models = identify_models(config, out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        denoiser = (
            make_denoiser(config, dataset, coding) if teacher is None else teacher.student(config.dtype)
        )
    check_given(config, denoiser)
    if config.init is not None and newest(out / CHECKPOINTS) is None:
        take_over(denoiser, config.init)
    info = {
        "preset": preset,
        "coding": coding.to_json(),
        "class_names": list(dataset.class_names),
        "data": dataset.name,
        **({"label_dropout": config.label_dropout} if config.label_dropout else {}),
        **({"sigma_max": config.sigma_max} if config.sigma_max != TrainConfig.sigma_max else {}),
        **({"objective": config.objective} if config.objective != "denoise" else {}),
        **carried_licence(models),
    }
    if teacher is not None and config.consistency is not None:
        info["consistency"] = {
            "teacher": config.consistency.teacher,
            "sigma_max": config.consistency.sigma_max,
        }
        info |= teacher.licence
    return Assembly(
        dataset=dataset,
        held_out=held_out,
        coding=coding,
        models=models,
        denoiser=denoiser,
        objective=(
            make_objective(config)
            if teacher is None
            else ConsistencyObjective(config, teacher.with_fixed_weights())
        ),
        info=info,
    )
