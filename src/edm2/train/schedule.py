"""The learning-rate schedule.

Ref: EDM2 Eq. 67 and Sec. 2.3.
"""

import math


def learning_rate(
    num_images: float,
    *,
    batch_size: int,
    ref_lr: float,
    ref_batches: float,
    rampup_mimg: float,
    cosine_images: float | None = None,
) -> float:
    """Compute the learning rate: linear ramp-up, constant rate, then inverse square root decay; or half a cosine.

    Args:
        num_images: Images seen before the step.
        batch_size: Images per step.
        ref_lr: The constant rate.
        ref_batches: Steps after which the rate decays; 0 for no decay.
        rampup_mimg: Length of the ramp-up in millions of images; 0 for none.
        cosine_images: Images after which half a cosine reaches 0, instead of the inverse square root.

    Returns:
        Rate for the step that starts at `num_images`.
    """
    lr = ref_lr
    if cosine_images is not None:
        lr *= (1 + math.cos(math.pi * min(num_images / cosine_images, 1))) / 2
    elif ref_batches > 0:
        lr /= math.sqrt(max(num_images / (ref_batches * batch_size), 1))
    if rampup_mimg > 0:
        lr *= min(num_images / (rampup_mimg * 1e6), 1)
    return lr
