"""Post-hoc EMA for any PyTorch model: track a few averages, get any other one after training.

Needs torch, numpy and safetensors, and nothing else of edm2.

- `edm2.ema.maths`: profiles, targets, plans, and the solver (float64, no modules)
- `edm2.ema.tracking`: what happens at every step (`PowerEMA`)
- `edm2.ema.storage`: files on disk
- `edm2.ema.callbacks`: inside other libraries' training loops
- `edm2.ema.reconstruct`: averages of any length from snapshots
- `edm2.ema.checkpoints`: averages of checkpoints that another trainer wrote
"""

from edm2.ema.checkpoints import average_checkpoints, merge_checkpoints
from edm2.ema.maths.planning import plan
from edm2.ema.maths.plans import PLANS, Plan
from edm2.ema.maths.profiles import decay, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2.ema.maths.solve import solve_coefficients
from edm2.ema.maths.targets import Target
from edm2.ema.reconstruct import (
    AccuracyWarning,
    Reconstruction,
    reconstruct,
    reconstruct_each,
    reconstruct_many,
)
from edm2.ema.tracking.tracked import LiveEMA
from edm2.ema.tracking.tracker import PowerEMA

__all__ = [
    "PLANS",
    "AccuracyWarning",
    "LiveEMA",
    "Plan",
    "PowerEMA",
    "Reconstruction",
    "Target",
    "average_checkpoints",
    "decay",
    "gamma_to_sigma_rel",
    "merge_checkpoints",
    "plan",
    "reconstruct",
    "reconstruct_each",
    "reconstruct_many",
    "sigma_rel_to_gamma",
    "solve_coefficients",
]
