"""What this process does with memory that it has freed."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Let the C library reuse freed blocks of up to 1 GiB instead of returning them to Linux, for the whole process.

    A training step on the CPU frees all of its activations. Returned, they come back page by page, each one cleared,
    in the next step, which takes up to a fifth of the time. The peak of memory stays the same. Where environment
    variables configure the allocator, and on other systems, nothing is changed.

    Returns:
        Whether it was set.
    """
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform != "linux" or configured:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _ONE_GIB)) and bool(mallopt(_TRIM_THRESHOLD, -1))
