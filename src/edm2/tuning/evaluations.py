"""Scores that a run's folder remembers, so that an interrupted search continues."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edm2.train.logs import append_log, read_log, rewind_log
from edm2.tuning.result import FOLDER

_LOG = "evaluations.jsonl"


class Evaluations:
    """Scores by what they depend on.

    Args:
        run: Folder of a run.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        rewind_log(self._folder, sys.maxsize, _LOG)  # without the line that a kill cut short
        records = read_log(self._folder, _LOG)
        self._known: dict[str, float] = {record["key"]: record["score"] for record in records}

    def score(
        self, facts: list[Any], compute: Callable[[], float], *, num_images: float, **told: Any
    ) -> float:
        """The score that belongs to these facts; computed unless that was done before.

        Args:
            facts: Everything that the score depends on, as JSON values.
            compute: Gives the score.
            num_images: Point of the run, for the log.
            **told: What else a reader of the log wants to know.
        """
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = compute()
            self._folder.mkdir(exist_ok=True)
            record = {"num_images": int(num_images), "key": key, "score": self._known[key], **told}
            append_log(self._folder, record, _LOG)
        return self._known[key]
