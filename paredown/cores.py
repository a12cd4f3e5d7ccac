"""What the CPU has: cores, the number of threads wherever nobody asks for another one, and bfloat16."""

from __future__ import annotations

import os


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether it multiplies in bfloat16 by itself; else torch only emulates that, slowly."""
    import torch

    return any(have for name, have in torch.cpu.get_capabilities().items() if "bf16" in name)
