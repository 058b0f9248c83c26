"""The learning-rate schedule.

Ref: EDM2 Eq. 67 and Sec. 2.3; SPEC section 4.
"""

import math


def learning_rate(
    num_images: float, *, batch_size: int, ref_lr: float, ref_batches: float, rampup_mimg: float
) -> float:
    """Linear ramp-up, then a constant rate, then decay with the inverse square root of time.

    Args:
        num_images: images seen before the step.
        batch_size: images a step.
        ref_lr: the constant rate.
        ref_batches: steps after which the rate decays; 0 for no decay.
        rampup_mimg: length of the ramp-up, in millions of images; 0 for none.

    Returns:
        The rate for the step that starts at `num_images`.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(num_images / (ref_batches * batch_size), 1))
    if rampup_mimg > 0:
        lr *= min(num_images / (rampup_mimg * 1e6), 1)
    return lr
