"""What a run writes down as it trains: lines of its logs, and the same for loggers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from edm2.nn.magnitudes import Magnitudes
from edm2.train.loggers import Logger, RichLogger, numbers
from edm2.train.logs import (
    LOG_FILE,
    MAGNITUDES_FILE,
    VALIDATION_FILE,
    append_log,
    is_validation,
    read_log,
    rewind_log,
)


class Records:
    """The logs in a run's folder; on all processes but the first, nothing is written.

    Args:
        out: Folder of the run.
        is_first: Whether this process writes.
    """

    def __init__(self, out: Path, *, is_first: bool) -> None:
        self._out, self._is_first = out, is_first
        self._loggers: Sequence[Logger] = ()

    @contextmanager
    def logging_to(
        self, loggers: Sequence[Logger], run_id: str, settings: Mapping[str, Any], num_images: int
    ) -> Iterator[None]:
        """Tell loggers, too; arguments as in `Logger.start`."""
        self._loggers = loggers if self._is_first else ()
        for logger in self._loggers:
            logger.start(self._out, run_id, settings, num_images)
        try:
            yield
        finally:
            for logger in self._loggers:
                logger.finish()

    def rewind(self, num_images: int) -> None:
        """Drop the lines after `num_images` images, which will be trained again."""
        if self._is_first:
            for name in (LOG_FILE, MAGNITUDES_FILE, VALIDATION_FILE):
                rewind_log(self._out, num_images, name)

    def progress(self, num_images: int, record: Mapping[str, Any]) -> None:
        """Write a line of the log."""
        self._add(num_images, record, LOG_FILE, numbers({"num_images": num_images, **record}))

    def magnitudes(self, num_images: int, found: Magnitudes) -> None:
        """Write magnitudes that were recorded in a step."""
        self._add(num_images, dataclasses.asdict(found), MAGNITUDES_FILE)

    def validation(self, num_images: int, found: Mapping[str, Any]) -> None:
        """Write the loss on held-out images."""
        told = {f"validation/{key}": found[key] for key in ("loss", "loss_ema")}
        self._add(num_images, found, VALIDATION_FILE, told)

    def validations(self) -> list[dict[str, Any]]:
        """Lines of held-out loss so far; none on other processes than the first."""
        if not self._is_first:
            return []
        return read_log(self._out, VALIDATION_FILE, is_wanted=is_validation)

    def image(self, num_images: int, name: str, picture: np.ndarray) -> None:
        """Send a picture, `[H, W, 3]` uint8, to the loggers that take pictures."""
        for logger in self._loggers:
            if isinstance(logger, RichLogger):
                logger.image(num_images, name, picture)

    def histograms(self, num_images: int, network: nn.Module) -> None:
        """Send histograms of the weights to the loggers that take them."""
        for logger in self._loggers:
            if isinstance(logger, RichLogger):
                for name, p in network.named_parameters():
                    logger.histogram(num_images, f"weights/{name}", p.detach().float().cpu().numpy())

    def _add(
        self, num_images: int, record: Mapping[str, Any], name: str, told: Mapping[str, float] | None = None
    ) -> None:
        if self._is_first:
            append_log(self._out, {"num_images": num_images, **record}, name)
        for logger in self._loggers if told else ():
            logger.log(num_images, told or {})
