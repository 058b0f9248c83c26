"""What a run adds up between two lines of its log, and the steps that went wrong."""

from typing import Any

import torch
from torch import Tensor


class Tally:
    """Sums of loss and gradient norm over the steps where both are finite; kept on the device.

    Args:
        device: where losses come from.
    """

    def __init__(self, device: torch.device) -> None:
        # Loss, gradient norm, steps, steps that were not finite.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step, without waiting for the device."""
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
        """Steps up to the last one that were not finite; waits for the device."""
        return int(self._bad_in_a_row)

    def take(self) -> dict[str, Any]:
        """Means since the last call, None where no step was finite, and the number of those that were not."""
        loss, norm, good, bad = self._sums.tolist()
        self._sums.zero_()
        return {
            "loss": loss / good if good else None,
            "grad_norm": norm / good if good else None,
            "nonfinite_steps": int(bad),
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"sums": self._sums.tolist(), "bad_in_a_row": self.bad_in_a_row}

    def load_json(self, content: dict[str, Any]) -> None:
        """Take up what `to_json` gave."""
        self._sums.copy_(torch.tensor(content["sums"], dtype=torch.float64))
        self._bad_in_a_row.fill_(content["bad_in_a_row"])
