"""Forecasts step by step: each new frame joins the condition of the next."""

from collections.abc import Callable
from typing import Any

import numpy as np

from edm2.generate import ImageGenerator
from edm2.generate.members import member_seeds


def past_frames(generator: ImageGenerator) -> int:
    """Number of past frames that a model continues.

    Raises:
        ValueError: If its condition is not whole frames of its own images.
    """
    channels, height, width = generator.denoiser.img_shape
    coding = generator.coding.condition
    given = (generator.denoiser.cond_channels, height, width) if coding is None else coding.shape
    if not given[0]:
        raise ValueError(
            "this model takes no condition: a forecast needs one that was trained with past frames as the condition "
            "and the next frame as the image"
        )
    if given[0] % channels or given[1:] != (height, width):
        raise ValueError(
            f"this model makes images of {channels} x {height} x {width} from conditions of "
            f"{' x '.join(map(str, given))}: a forecast needs conditions that are whole past frames, the channels of "
            "the earliest first"
        )
    return given[0] // channels


def roll_out(
    generator: ImageGenerator,
    start: np.ndarray,
    cases: np.ndarray,
    members: np.ndarray,
    *,
    steps: int,
    seed: int = 0,
    common: bool = False,
    vectors: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    on_step: Callable[[], None] | None = None,
    **options: Any,
) -> np.ndarray:
    """Continue films by a number of frames, all in one batch.

    Args:
        generator: Model of the next frame given the last ones.
        start: `[B, frames, C, H, W]` in the data's own units, the latest frame last.
        cases: `[B]` number of each row's case.
        members: `[B]` number of each row's member.
        steps: Frames to add.
        seed: Member m of case i depends on (seed, i, m) and its start alone.
        common: See `edm2.generate.members.member_seeds`.
        vectors: `[B, steps, V]` that the model takes at each step, in their own units.
        labels: `[B]` classes of the rows.
        on_step: Called after each step.
        **options: Guide and fields of `edm2.generate.SamplerOptions`.

    Returns:
        `[B, steps, C, H, W]` in the type that the model makes.

    Raises:
        ValueError: As in `ImageGenerator.images`.
        FloatingPointError: If values are not finite.
    """
    frames: list[np.ndarray] = list(start.swapaxes(0, 1))
    made = []
    for step in range(steps):
        seeds = member_seeds(cases, members, seed=seed, step=step, common=common)
        given: dict[str, Any] = {} if vectors is None else {"vectors": vectors[:, step]}
        condition = np.concatenate(frames, axis=1)
        new = generator.images(seeds, labels, conditions=condition, batch_size=len(seeds), **given, **options)
        made.append(new)
        frames = [*frames[1:], new.astype(start.dtype, copy=False)]
        if on_step is not None:
            on_step()
    return np.stack(made, axis=1)
