"""What a conditional run's images are given: cases of its data, or a picture that a visitor drops on the page."""

import hashlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.prepare.resize import crop_centre
from edm2.files import write_atomic
from edm2.studio.choices import Choice
from edm2.train.build import open_run_data
from edm2.train.coding import Coding
from edm2.train.settings_file import run_settings
from edm2.train.validation import split_data

_KEPT_PICTURES = 32


class Cases:
    """Cases that a conditional run can be given.

    Args:
        run: Folder of the run.
        coding: Its coding, with conditions.

    Attributes:
        kind: "held-out" where the run held images out, else "training".
        takes_pictures: Whether a picture can stand in for a case's condition.

    Raises:
        ValueError: If the data cannot be opened any more.
    """

    def __init__(self, run: Path, coding: Coding) -> None:
        assert coding.condition is not None
        self._coding, self._condition = coding, coding.condition
        try:
            training, held_out = split_data(open_run_data(run), run_settings(run))
        except (ValueError, OSError) as error:
            raise ValueError(f"the studio takes conditions from the data of {run}: {error}") from error
        self._data = training if held_out is None else held_out
        self.kind = "training" if held_out is None else "held-out"
        self.takes_pictures = self._condition.kind == "pixels" and self._condition.shape[0] in (1, 3)
        self._pictures: OrderedDict[str, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._data)

    def drop(self, picture: np.ndarray) -> str:
        """Take a picture, `[H, W, 3]` uint8, as a condition; returns its name for `Choice.dropped`.

        The part in the middle is scaled to the size of the run's conditions; colours become grey where these are.
        """
        channels, *size = self._condition.shape
        image = crop_centre(np.ascontiguousarray(picture.transpose(2, 0, 1)), (size[0], size[1]))
        if channels == 1:
            image = np.round(np.tensordot([0.299, 0.587, 0.114], image, 1)).astype(np.uint8)[None]
        name = hashlib.sha256(image.tobytes()).hexdigest()[:12]
        self._pictures[name] = image
        self._pictures.move_to_end(name)
        while len(self._pictures) > _KEPT_PICTURES:
            self._pictures.popitem(last=False)
        return name

    def given(self, choice: Choice, count: int) -> dict[str, Any]:
        """What each of `count` images of a choice is given, as arguments of `ImageGenerator.images`.

        Raises:
            ValueError: If there is no such case, or the dropped picture is gone.
        """
        if not 0 <= choice.case < len(self):
            raise ValueError(f"case {choice.case} does not exist: choose one from 0 to {len(self) - 1}")
        row = np.array([choice.case])
        found: dict[str, np.ndarray] = dict(self._data.given(row))
        if choice.dropped is not None:
            if choice.dropped not in self._pictures:
                raise ValueError("the picture is no longer in memory: drop it again")
            found["conditions"] = self._pictures[choice.dropped][None]
        if self._data.num_classes and choice.label is None:
            found["labels"] = self._data.labels(row)
        if self._coding.vectors is None:
            found.pop("vectors", None)
        return {name: np.repeat(value, count, axis=0) for name, value in found.items()}

    def truth(self, choice: Choice) -> np.ndarray | None:
        """The data's own image for a case, `[1, C, H, W]`; None for a dropped picture."""
        return None if choice.dropped is not None else self._data.images(np.array([choice.case]))

    def file(self, choice: Choice, folder: Path) -> Path:
        """Write what a choice is given as an `.npz` file for `edm2 sample --conditions`, unless it is there."""
        name = f"case-{choice.case}" + (f"-{choice.dropped}" if choice.dropped else "")
        path = folder / (f"{name}.npz" if choice.label is None else f"{name}-unlabelled.npz")
        if not path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **self.given(choice, 1))
            folder.mkdir(exist_ok=True)
            write_atomic(path, buffer.getvalue())
        return path
