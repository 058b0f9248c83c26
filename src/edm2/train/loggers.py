"""Experiment loggers: TensorBoard, Weights & Biases, trackio, or anything with the same three methods.

The run's own JSON lines are always written; loggers come in addition.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edm2.extras import need

_WITHOUT = ", or leave it out of --log-to: the run's log.jsonl is written in any case"


class Logger(Protocol):
    """Receives the log records of a run while it trains."""

    def start(self, run: Path, run_id: str, settings: Mapping[str, Any], num_images: int) -> None:
        """Start or continue a run.

        Args:
            run: Folder of the run.
            run_id: Name of the run, the same when it continues.
            settings: All settings.
            num_images: Images seen; records beyond them will be logged again.
        """

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Log the values of one moment."""

    def finish(self) -> None:
        """Flush and close."""


@runtime_checkable
class RichLogger(Logger, Protocol):
    """A logger that also takes pictures and histograms."""

    def image(self, num_images: int, name: str, picture: np.ndarray) -> None:
        """Log a picture, `[H, W, 3]` uint8."""

    def histogram(self, num_images: int, name: str, values: np.ndarray) -> None:
        """Log how some values are distributed."""


class TensorBoard:
    """Writes event files into the folder `tensorboard` of the run."""

    def __init__(self) -> None:
        self._module = need("torch.utils.tensorboard", "--log-to tensorboard", instead=_WITHOUT)
        self._writer: Any = None

    def start(self, run: Path, run_id: str, settings: Mapping[str, Any], num_images: int) -> None:
        """See `Logger.start`."""
        # Purging hides records that an interrupted session logged after its last checkpoint.
        self._writer = self._module.SummaryWriter(str(run / "tensorboard"), purge_step=num_images + 1)

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=num_images)

    def image(self, num_images: int, name: str, picture: np.ndarray) -> None:
        """See `RichLogger.image`."""
        self._writer.add_image(name, picture, global_step=num_images, dataformats="HWC")

    def histogram(self, num_images: int, name: str, values: np.ndarray) -> None:
        """See `RichLogger.histogram`."""
        self._writer.add_histogram(name, values, global_step=num_images)

    def finish(self) -> None:
        """See `Logger.finish`."""
        self._writer.close()


class _Hosted:
    """wandb, and trackio, which has the same functions."""

    def __init__(self, package: str) -> None:
        self._module = need(package, f"--log-to {package}", instead=_WITHOUT)

    def start(self, run: Path, run_id: str, settings: Mapping[str, Any], num_images: int) -> None:
        """See `Logger.start`."""
        self._module.init(**self._identity(run, run_id), config=dict(settings), resume="allow")

    def _identity(self, run: Path, run_id: str) -> dict[str, Any]:
        raise NotImplementedError

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        self._module.log(dict(values), step=num_images)

    def image(self, num_images: int, name: str, picture: np.ndarray) -> None:
        """See `RichLogger.image`."""
        self._module.log({name: self._module.Image(picture)}, step=num_images)

    def histogram(self, num_images: int, name: str, values: np.ndarray) -> None:
        """See `RichLogger.histogram`; left out by a package that has none."""
        if hasattr(self._module, "Histogram"):
            self._module.log({name: self._module.Histogram(values)}, step=num_images)

    def finish(self) -> None:
        """See `Logger.finish`."""
        self._module.finish()


class WandB(_Hosted):
    """Weights & Biases, with its own settings from the environment (WANDB_PROJECT, WANDB_MODE)."""

    def __init__(self) -> None:
        super().__init__("wandb")

    def _identity(self, run: Path, run_id: str) -> dict[str, Any]:
        return {"id": run_id, "name": run.name, "dir": str(run)}


class Trackio(_Hosted):
    """trackio, which keeps its data on this machine; project `edm2`, a run's folder and identity as its name."""

    def __init__(self) -> None:
        super().__init__("trackio")

    def _identity(self, run: Path, run_id: str) -> dict[str, Any]:
        return {"project": "edm2", "name": f"{run.name}-{run_id}"}


LOGGERS: dict[str, Callable[[], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def open_loggers(names: tuple[str, ...]) -> list[Logger]:
    """Open loggers by name, so that a missing package is noticed before the run starts.

    Raises:
        ValueError: If a name is unknown.
        MissingExtra: If a package is not installed.
    """
    unknown = [name for name in names if name not in LOGGERS]
    if unknown:
        raise ValueError(f"unknown logger {unknown[0]!r}: choose from {', '.join(LOGGERS)}")
    return [LOGGERS[name]() for name in names]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric values of a log record."""
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
