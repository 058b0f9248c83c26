"""The ordinary EMA of other libraries, followed beside the power-function averages."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LiveEMA:
    """An exponential average with constant decay after a warm-up; it is at hand at every moment.

    The decay of step k, counted from `update_after_step`, is `1 - (1 + k / inv_gamma)**-power`, kept between
    `min_value` and `beta`. Until `update_after_step` the average is a copy of the weights. Where an update comes
    every n steps, it applies the decay of n steps.

    Attributes:
        beta: Largest decay per unit of the clock, in [0, 1).
        update_after_step: Time up to which the weights are copied, in the clock's unit.
        inv_gamma: Pace of the warm-up; None for a constant decay from the start.
        power: Exponent of the warm-up: 2/3 for long trainings, 3/4 for shorter ones.
        min_value: Smallest decay, in [0, beta].

    Raises:
        ValueError: If a setting is out of range.
    """

    beta: float = 0.9999
    update_after_step: float = 0
    inv_gamma: float | None = 1.0
    power: float = 2 / 3
    min_value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_value <= self.beta < 1:
            raise ValueError(
                f"min_value {self.min_value:g} and beta {self.beta:g} must satisfy 0 <= min_value <= beta < 1: 0.9999"
                " is a usual beta"
            )
        if self.inv_gamma is not None and not (self.inv_gamma > 0 and self.power > 0):
            raise ValueError(
                f"inv_gamma {self.inv_gamma:g} and power {self.power:g} must be above 0: inv_gamma=None switches the"
                " warm-up off"
            )

    def share(self, elapsed: float, dt: float) -> float:
        """Share of the latest `dt` of time in the average."""
        step = elapsed - self.update_after_step - 1
        if step <= 0:
            return 1.0
        warm = 1.0 if self.inv_gamma is None else 1 - (1 + step / self.inv_gamma) ** -self.power
        value = min(max(warm, self.min_value), self.beta)
        return -math.expm1(dt * math.log(value)) if value else 1.0
