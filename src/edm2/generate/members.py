"""Seeds of ensemble members: member m of case i depends on (seed, i, m) alone, however the work is shared."""

import numpy as np
import torch

from edm2.nn.keyed_random import philox

_WORD = 0xFFFFFFFF


def member_seeds(
    cases: np.ndarray, members: np.ndarray, *, seed: int, step: int = 0, common: bool = False
) -> list[int]:
    """One seed of an image for each pair of case and member.

    Args:
        cases: `[B]` numbers of the cases, from 0.
        members: `[B]` numbers of the members, from 0.
        seed: Seed of the whole ensemble.
        step: Step of a forecast, from 0; each has noise of its own.
        common: Whether a member has the same noise in all cases, so that these differ by what they are given alone.

    Returns:
        B seeds below 2^63.
    """
    case, member = (torch.as_tensor(np.asarray(x, np.int64)) for x in (cases, members))
    if common:
        case = torch.full_like(case, -1)
    step_word = torch.full_like(case, step)
    counter = (step_word, member & _WORD, case & _WORD, (case >> 32) & _WORD)
    high, low, *_ = philox(counter, (torch.tensor(seed & _WORD), torch.tensor((seed >> 32) & _WORD)))
    seeds: list[int] = ((high << 31) ^ low).tolist()
    return seeds
