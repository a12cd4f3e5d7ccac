"""The machine card: what a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from paredown.cores import cores

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")  # what decides the speed of GEMMs
LIBRARIES = ("torch", "transformers", "numpy", "onnxruntime", "openvino", "onnx", "nncf", "scikit-learn")


def card() -> dict[str, Any]:
    """CPU model, its flags of interest, cores this process may use, memory, system, Python and library versions.

    Keys: `cpu` str, `flags` list, `cores` int, `memory_gib` float (0.0 where the system does not tell), `system` str,
    `python` str, `libraries` {name: version} of those installed. Nothing is imported to find the versions.
    """
    name, flags = _cpu()
    return {
        "cpu": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": _versions(),
    }


def _cpu(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Name and flags as Linux tells them; elsewhere the name alone."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return 0.0


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
