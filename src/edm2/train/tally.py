"""Sums between two lines of the log, and a count of non-finite steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from edm2.files import Range, from_json


@dataclass(frozen=True, kw_only=True)
class _Stored:
    sums: list[Annotated[float, Range(low=-1e300, high=1e300)]]
    bad_in_a_row: Annotated[int, Range(low=0, high=1 << 40)]


class Tally:
    """Sums loss and gradient norm over the steps in which both are finite, on the device.

    Args:
        device: Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        # Loss, gradient norm, steps, steps that were not finite.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step without synchronising with the device."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        zero = torch.zeros_like(self._bad_in_a_row)
        self._sums += torch.stack(
            [
                torch.where(finite, loss, zero),
                torch.where(finite, norm.double(), zero),
                finite.double(),
                1 - finite.double(),
            ]
        )
        self._bad_in_a_row = torch.where(finite, zero, self._bad_in_a_row + 1)

    @property
    def bad_in_a_row(self) -> int:
        """Number of non-finite steps in a row, up to the last one; synchronises with the device."""
        return int(self._bad_in_a_row)

    def take(self) -> dict[str, Any]:
        """Return the means since the last call, None if no step was finite, and the number of non-finite steps."""
        loss, norm, good, bad = self._sums.tolist()
        self._sums.zero_()
        return {
            "loss": loss / good if good else None,
            "grad_norm": norm / good if good else None,
            "nonfinite_steps": int(bad),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"sums": self._sums.tolist(), "bad_in_a_row": self.bad_in_a_row}

    def load_json(self, content: dict[str, Any]) -> None:
        """Load the result of `to_json`.

        Raises:
            TypeError: If it is something else.
            ValueError: If there are more or fewer sums.
        """
        stored = from_json(_Stored, content)
        if len(stored.sums) != len(self._sums):
            raise ValueError(f"{len(stored.sums)} sums in place of {len(self._sums)}")
        self._sums.copy_(torch.tensor(stored.sums, dtype=torch.float64))
        self._bad_in_a_row.fill_(stored.bad_in_a_row)


def nonfinite_error(
    bad: int, num_images: int, batch_size: int, checkpoint: Path | None
) -> FloatingPointError:
    """Return the error of a run that stops because losses or gradients stay non-finite.

    Args:
        bad: Number of such steps in a row.
        num_images: Images seen after the last of them.
        batch_size: Images in a step.
        checkpoint: Newest checkpoint, if there is one.
    """
    first = num_images // batch_size - bad + 1
    kept = "none yet" if checkpoint is None else f"{checkpoint}, from before"
    return FloatingPointError(
        f"loss or gradients were NaN or infinite in {bad} steps in a row, from step {first} (image "
        f"{(first - 1) * batch_size}) on. The newest checkpoint is {kept}; the same command would end here again. "
        "Look for bad values in the data, lower --optimizer.ref-lr, or use --dtype float32 or bfloat16: "
        "these changes need a new --out. Only --loss-scaling, for float16, may change in this one"
    )
