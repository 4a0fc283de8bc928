"""Memory that torch frees on a CPU, kept for what it allocates next."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""glibc's names for what ``mallopt`` sets (malloc.h)."""
_OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep blocks that are freed in this process; says whether it does.

    It maps large blocks, such as the activations of a convolution, afresh for every tensor, and gives them back when
    the tensor is freed; the system then hands out zeroed pages one by one, 15 to 30% of the step of a convolutional
    GAN. Kept, they are used again. The process stays as large as it was at its largest. Does nothing without glibc, and
    where the environment sets glibc's own variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_WISHES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
