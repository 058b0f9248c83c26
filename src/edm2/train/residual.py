"""Diffusion of a regression's residuals: the regression, the statistics of its residuals, and the way there and back.

A run keeps a copy of its regression, `mean.safetensors`, whose samples are the regression plus a sampled residual.

Ref: residual corrective diffusion (arXiv 2309.15214) Sec. 3.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.data import Batch, ImageDataset
from edm2.diffusion import Denoiser, load_model, read_model_header
from edm2.diffusion.description import check_info
from edm2.diffusion.model_file import model_checksum
from edm2.files import read_sealed, write_atomic, write_sealed
from edm2.train.coding import Coding
from edm2.train.inputs import code_batch
from edm2.train.objectives import MEAN_SIGMA, TrainingBatch
from edm2.train.run_folder import difference
from edm2.train.world import World

MEAN_FILE = "mean.safetensors"
_FACTS = "residual.json"
_MEASURED = 1024  # images that the statistics are measured on
_AT_A_TIME = 64


def regression(denoiser: Any, like: Tensor, labels: Tensor | None, **given: Any) -> Tensor:
    """What a network of the objective `mean` expects, in network units.

    Args:
        denoiser: The network.
        like: `[B, C, H, W]`, for shape and device.
        labels: As the denoiser takes them.
        **given: Condition and the like.
    """
    sigma = torch.full((len(like),), MEAN_SIGMA, device=like.device)
    found: Tensor = denoiser(torch.zeros_like(like), sigma, labels, **given)
    return found


@dataclass(frozen=True)
class Residual:
    """A regression, and the mean and standard deviation of its residuals.

    Attributes:
        network: The regression, in eval mode.
        sha256: Checksum of its weights.
        mean: Mean of the residual of each channel, in network units.
        std: Standard deviation of the residual of each channel, in network units.
        file: Where it was read.
    """

    network: Denoiser
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: Path

    def subtract(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with residuals of standard deviation sigma_data in place of its images."""
        shift, scale = self._scales(batch.images)
        with torch.no_grad():
            images = (batch.images - self._expected(batch) - shift) / scale
        if batch.mask is not None:
            images = torch.where(batch.mask, images, 0.0)
        return dataclasses.replace(batch, images=images)

    def add(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        """Images in network units for sampled residuals."""
        shift, scale = self._scales(x)
        given = {} if condition is None else {"condition": condition}
        with torch.no_grad():
            return x * scale + shift + regression(self.network, x, labels, **given)

    def to(self, device: torch.device | str) -> "Residual":
        """Move to a device; returns itself."""
        self.network.to(device)
        return self

    def to_json(self) -> dict[str, Any]:
        """What models say about it."""
        return {"sha256": self.sha256, "mean": list(self.mean), "std": list(self.std)}

    def _expected(self, batch: TrainingBatch) -> Tensor:
        given: dict[str, Any] = {} if batch.condition is None else {"condition": batch.condition}
        if self.network.augment_dim:
            given["augment_labels"] = batch.augment_labels
        return regression(self.network, batch.images, batch.labels, **given)

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.tensor(self.mean, device=like.device).reshape(-1, 1, 1)
        scale = torch.tensor(self.std, device=like.device).reshape(-1, 1, 1) / self.network.sigma_data
        return shift, scale


def shared_coding(path: str | Path, coding: Coding, dataset: ImageDataset) -> Coding:
    """The coding that a regression was trained with, for the model of its residuals.

    Args:
        path: The regression.
        coding: What the data alone would get.
        dataset: The data.

    Raises:
        ValueError: If there is no such model, it is not a regression, or it was trained on other kinds of data.
    """
    header = read_model_header(path)[1]
    if header["info"].get("objective") != "mean":
        raise ValueError(
            f"{path} is not a regression: train one with --objective mean on the same data, and give it as --residual"
        )
    shared, network = Coding.from_json(header["info"]["coding"]), header["network"]
    height, width = dataset.image_shape[1:]
    size = height if height == width else [height, width]
    ours = _facts(coding, size, coding.label_dim or dataset.num_classes)
    theirs = _facts(shared, network.get("img_resolution", size), network.get("label_dim") or 0)
    for name in ("missing values", "missing values of conditions"):
        ours[name] = ours[name] or theirs[name]  # what was trained with some also takes data without any
    if ours != theirs:
        raise ValueError(
            f"the regression {path} was trained on other data ({difference(theirs, ours)}): train one on this data"
        )
    return shared


def _facts(coding: Coding, size: Any, label_dim: int) -> dict[str, Any]:
    """What a regression and the data of its residuals must agree on."""
    given = coding.condition
    return {
        "kind": coding.kind,
        "channels": coding.num_channels,
        "size": size,
        "label size": label_dim,
        "sigma_data": coding.values.sigma_data,
        "missing values": coding.missing,
        "conditions": None if given is None else f"{given.kind} {list(given.shape)}",
        "missing values of conditions": given is not None and given.missing,
    }


def keep_residual(source: str, out: Path, dataset: ImageDataset, coding: Coding, world: World) -> Residual:
    """Copy a regression into a run's folder and measure its residuals, or open what an earlier session kept.

    Args:
        source: The regression; needed by the first session only.
        out: Folder of the run.
        dataset: Training images.
        coding: Their coding.
        world: The processes of the run; the first one writes.
    """
    path, facts = out / MEAN_FILE, out / _FACTS

    def store() -> None:
        if not path.exists():
            write_atomic(path, read_model_header(source)[0].read_bytes())
        if not facts.exists():
            measured = measure_residual(path, dataset, coding, world.device)
            write_sealed(facts, {"residual": measured.to_json()})

    world.on_first(store)
    try:
        told = read_sealed(facts)
        check_info({"residual": told["residual"] or {}})
    except (ValueError, KeyError) as error:
        raise ValueError(f"{facts} is damaged ({error}): restore it from a copy") from error
    found = open_residual(out, told, world.device)
    assert found is not None
    return found


def measure_residual(path: Path, dataset: ImageDataset, coding: Coding, device: torch.device) -> Residual:
    """Open a regression and measure its residuals on the training images.

    Raises:
        ValueError: If it predicts a channel exactly.
    """
    network = load_model(path, device=device)[0]
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _MEASURED)).astype(np.int64))
    channels = coding.num_channels
    sums = torch.zeros(3, channels, dtype=torch.float64)
    unscaled = Residual(network, "", (0.0,) * channels, (network.sigma_data,) * channels, path)
    for part in np.array_split(rows, -(-len(rows) // _AT_A_TIME)):
        batch = Batch.read(dataset, part, int(part[0]))
        coded = unscaled.subtract(code_batch(batch, coding, seed=0, num_images=0, device=device))
        left = coded.images.double().cpu()
        known = torch.ones_like(left) if coded.mask is None else coded.mask.cpu().double()
        sums += torch.stack([(known * left**power).sum((0, 2, 3)) for power in range(3)])
    mean = sums[1] / sums[0]
    std = (sums[2] / sums[0] - mean**2).clamp(min=0).sqrt()
    if float(std.min()) < 1e-6 * network.sigma_data:
        raise ValueError(
            f"the regression {path} predicts channel {int(std.argmin())} exactly: there is no residual to model"
        )
    return Residual(network, model_checksum(path), tuple(mean.tolist()), tuple(std.tolist()), path)


def copy_regression(model: Path, folder: Path) -> None:
    """Put the regression of a residual model next to models that are made from its run."""
    if not (folder / MEAN_FILE).exists() and (found := _beside(model)):
        write_atomic(folder / MEAN_FILE, found.read_bytes())


def _beside(model: Path) -> Path | None:
    folder = model if model.is_dir() else model.parent
    return next((p for p in (folder / MEAN_FILE, folder.parent / MEAN_FILE) if p.exists()), None)


def open_residual(
    model: str | Path, info: dict[str, Any], device: torch.device | str = "cpu"
) -> Residual | None:
    """The regression of a residual model, next to it or in the folder of its run; None for other models.

    Args:
        model: Model file or folder, such as a run.
        info: What the model says about itself.
        device: Where to put the regression.

    Raises:
        ValueError: If it is missing or another one.
    """
    told = info.get("residual")
    if told is None:
        return None
    found = _beside(Path(model))
    if found is None:
        raise ValueError(
            f"{model} is a residual model, and {MEAN_FILE} is not next to it: copy that file from the run that the "
            "model comes from"
        )
    if model_checksum(found) != told["sha256"]:
        raise ValueError(
            f"{found} is not the regression that {model} was trained with: copy {MEAN_FILE} from its run"
        )
    network = load_model(found, device=device)[0]
    if not len(told["mean"]) == len(told["std"]) == network.img_channels:
        raise ValueError(
            f"{model} does not have one mean and standard deviation for each of the {network.img_channels} channels of "
            f"{found}: restore it from a copy"
        )
    return Residual(network, told["sha256"], tuple(told["mean"]), tuple(told["std"]), found)
