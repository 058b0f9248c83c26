"""What the page of a run shows: its settings, logs, snapshots and tuned settings, read once."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from edm2.ema.storage.manifest import MANIFEST, read_manifest
from edm2.generate import ImageGenerator
from edm2.generate.lengths import generators
from edm2.generate.own_guide import OwnGuide, own_guide
from edm2.train.logs import (
    MAGNITUDES_FILE,
    VALIDATION_FILE,
    is_magnitudes,
    is_progress,
    is_validation,
    read_log,
)
from edm2.train.run_folder import SNAPSHOTS, read_config
from edm2.train.settings_file import run_settings
from edm2.tuning.lengths import read_lengths
from edm2.tuning.result import read_tuned

_MOMENTS, _STEPS = 6, 16
STUDENT_STEPS = (4, 2, 1)


class Run:
    """What a run's folder holds; snapshots that training adds later are not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name or str(folder.resolve())
        self.config = run_settings(folder)
        self.preset = read_config(folder)["settings"].get("preset")
        self.log = read_log(folder, is_wanted=is_progress)
        if not self.log:
            raise ValueError(f"{folder} has no line in its log yet: train on before asking for a report")
        self.magnitudes = read_log(folder, MAGNITUDES_FILE, is_wanted=is_magnitudes)
        self.validation = read_log(folder, VALIDATION_FILE, is_wanted=is_validation)
        self.snapshots = folder / SNAPSHOTS
        self.manifest = read_manifest(self.snapshots) if (self.snapshots / MANIFEST).exists() else None
        self.times = sorted({s.t for s in self.manifest.snapshots}) if self.manifest else []
        self.tuned, self.lengths = read_tuned(folder), read_lengths(folder)

    @functools.cached_property
    def guide(self) -> OwnGuide:
        """What to sample with where nothing was tuned."""
        return own_guide(self.folder, self.times[-1])

    @property
    def is_student(self) -> bool:
        """Whether the run is one of `edm2 distill`."""
        return self.config.consistency is not None

    @property
    def sampling(self) -> dict[str, Any]:
        """A quick way to sample."""
        sampler = "consistency" if self.is_student else "dpmpp-2m"
        return {"num_steps": self.num_steps, "sampler": sampler}

    @property
    def num_steps(self) -> int:
        """Steps of the samples over time."""
        return STUDENT_STEPS[1] if self.is_student else _STEPS

    @property
    def sigma_rel(self) -> float:
        """EMA length to show: the tuned one, or 0.1 or the tracked one next to it."""
        return self.tuned.best.sigma_rel if self.tuned and self.tuned.is_better else self.guide.sigma_rel

    def generator(self, t: float | None = None) -> ImageGenerator:
        """Return the model with the EMA length to show at a time; default: the last."""
        assert self.manifest is not None
        t = self.times[-1] if t is None else t
        try:
            return next(generators(self.snapshots, [self.sigma_rel], t))
        except ValueError:  # a long average of an early moment
            tracked = {s.sigma_rel for s in self.manifest.snapshots}
            return next(generators(self.snapshots, [min(tracked, key=lambda s: abs(s - self.sigma_rel))], t))

    def moments(self) -> list[float]:
        """Return up to six times of snapshots, each about twice the one before."""
        wanted = [self.times[-1] / 2**k for k in reversed(range(_MOMENTS))]
        logs = np.log(self.times)
        return sorted({self.times[int(np.abs(logs - math.log(w)).argmin())] for w in wanted})
