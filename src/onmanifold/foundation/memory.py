"""How the C library treats freed memory: kept for the next pass, not returned to the system and fetched again."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# Parameters of glibc's mallopt(3), by their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**30
# Up to glibc 2.33 blocks beyond half a heap of threads cannot be kept.
_OLD_KEPT = 2**25


@cache
def keep_freed_memory() -> bool:
    """Let the process keep up to a gibibyte of freed memory for its next passes; True where that was set.

    An attack allocates and frees the same few megabytes thousands of times. By default glibc gives them back to
    the system each time, and the system clears every page anew, which takes up to half the time of a small
    network's pass on a CPU. Where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is set, or the system has no
    glibc, nothing is done. The setting is the process's, and stays.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    blocks = any(mallopt(_MMAP_THRESHOLD, kept) for kept in (_KEPT, _OLD_KEPT))
    return blocks and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
