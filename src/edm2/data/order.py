"""The order of training images, a pure function of (seed, images seen).

Resuming needs no stored state, and the order does not depend on the batch size or the number of processes.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of a data set for one epoch.

    Args:
        seed: Seed of the run, in [0, 2^64).
        epoch: Number of complete passes before this one.
        size: Number of images.

    Returns:
        `[size]` int64, read-only.

    Raises:
        ValueError: If the seed or epoch is outside [0, 2^64), or the data set is empty.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} must be in [0, 2^64)")
    if size < 1:
        raise ValueError(f"size {size} must be at least 1: the data set holds no images")
    # NumPy guarantees the bits of Philox across releases, but not those of Generator.permutation.
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def indices(position_start: int, count: int, *, size: int, seed: int) -> np.ndarray:
    """Return the images at the positions `[position_start, position_start + count)` of a run.

    Args:
        position_start: Number of training images seen before.
        count: Number of images; may span epochs.
        size: Number of images in the data set.
        seed: Seed of the run, in [0, 2^64).

    Returns:
        `[count]` int64.

    Raises:
        ValueError: If the start or count is negative, and as in `epoch_order`.
    """
    if position_start < 0 or count < 0:
        raise ValueError(f"position_start {position_start} and count {count} must not be negative")
    parts = []
    position, stop = position_start, position_start + count
    while position < stop:
        epoch, offset = divmod(position, max(size, 1))
        part = epoch_order(seed, epoch, size)[offset : offset + stop - position]
        parts.append(part)
        position += len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def generator_at(seed: int, position: int) -> np.random.Generator:
    """Random numbers for the image at a position of a run.

    Args:
        seed: Seed of the run, in [0, 2^64).
        position: Number of training images seen before.
    """
    # Another counter than that of the order, which has the same keys.
    philox = np.random.Philox(key=np.array([seed, position], np.uint64), counter=[0, 0, 0, 1])
    return np.random.Generator(philox)
