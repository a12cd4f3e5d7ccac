"""The control: does choosing matter at all? Units without any outgoing weight still score lowest."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: uniform in (0, 1], tied to each unit's own weights, so that permuting units permutes the scores."""
    alive = np.abs(evidence.outgoing[evidence.positions]).sum(axis=(1, 2))
    keys = np.lexsort(np.concatenate([evidence.incoming.T, alive[None]]))
    values = np.empty(len(alive))
    values[keys] = 1.0 - np.random.default_rng(evidence.seed).random(len(alive))
    return np.asarray(np.where(alive > 0, values, 0.0))
