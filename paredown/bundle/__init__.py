"""The artefact on disk: a folder that holds everything needed to serve, reopen and re-prove a cut model.

It appears whole or not at all, records a sha256 of every file, and holds no pickle. Opening it builds the dense
architecture without weights, of a transformer by its config and of a traced network by its graph, replays the folds and
the plan on it, and loads the weights: no code per family. The format is described in docs/bundle.md.
"""

from __future__ import annotations

from paredown.bundle._format import FORMAT, MANIFEST, SERVING
from paredown.bundle._load import Bundle, load, torch_runner
from paredown.bundle._save import check_free, save, save_network

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SERVING",
    "Bundle",
    "check_free",
    "load",
    "save",
    "save_network",
    "torch_runner",
]
