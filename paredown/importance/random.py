"""The control: does choosing matter at all? Units without any outgoing weight still score lowest."""

import numpy as np

from paredown.importance._evidence import DepthEvidence, Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "layer", "sublayer", "channel")
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: uniform in (0, 1], tied to each unit's own weights, so that permuting units permutes the scores."""
    size = np.abs(evidence.outgoing[evidence.positions]).sum(axis=(1, 2))
    keys = np.lexsort(np.concatenate([evidence.incoming.T, size[None]]))
    values = np.empty(len(size))
    values[keys] = 1.0 - np.random.default_rng(evidence.seed).random(len(size))
    return np.asarray(np.where(evidence.alive, values, 0.0))


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: uniform in (0, 1]."""
    return 1.0 - np.random.default_rng(evidence.seed).random(len(evidence.places) - 1)
