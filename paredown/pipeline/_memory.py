"""Keeping a long run small: what is freed goes back to the system, and its peak is known."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from typing import Any

# oneDNN keeps a compiled kernel for every shape it has seen, 1024 of them: texts of all lengths fill that with
# hundreds of MiB. It reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

WORKERS_MEMORY = 2 * 2**30  # bytes that the timing processes alive at once may hold together, plus one model's
WORKER_MEMORY = 0.15 * 2**30  # of one, plus twice its model: as read, and as the engine packs it

_M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
_MAPPED_FROM = 4 * 2**20  # bytes


def give_back_what_is_freed() -> None:
    """Hands what is freed but still held back to the system, where the C library is glibc.

    Now and then: telling malloc to do so at every free instead made distillation a third slower, measured.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, which has its own ways
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Gives blocks of 4 MiB and more a mapping of their own, which goes back when they are freed.

    Left alone, glibc raises that size to 32 MiB as blocks are freed, and texts of all lengths leave its heap full of
    holes: distilling on long texts peaked 200 MiB higher, and was no faster, measured.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def peak_mib() -> float:
    """The most memory this process has held, in MiB; the workers that time models are not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def at_once(model: Any) -> int:
    """How many processes that time `model` may be alive together and hold no more than pruning itself does."""
    return at_once_of(sum(p.numel() * p.element_size() for p in model.parameters()))


def at_once_of(size: int) -> int:
    """The same, of a model of so many bytes."""
    return max(2, min(8, int((WORKERS_MEMORY + size) / (WORKER_MEMORY + 2 * size))))
