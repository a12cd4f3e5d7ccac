"""Keeping a long run small: what is freed goes back to the system, and its peak is known."""

from __future__ import annotations

import ctypes
import os
import resource

# oneDNN keeps a compiled kernel for every shape it has seen, 1024 of them: texts of all lengths fill that with
# hundreds of MiB. It reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE = 1 << 20


def give_back_what_is_freed() -> None:
    """Blocks of a MiB and more go back to the system when freed, where the C library is glibc.

    By default it raises that limit as it goes, up to 32 MiB, and batches of changing lengths then leave a heap full of
    holes: a quarter of the memory held, in a distillation of 36 seconds.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library, which has its own ways
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)


def peak_mib() -> float:
    """The most memory this process has held, in MiB; the workers that time models are not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
