"""FLAP: how much a unit's contribution fluctuates about its mean, which a bias can stand in for (An et al. 2024,
arXiv:2312.11983).

The bias is put in by `paredown.recovery.compensate`: studies do so even where nothing is recovered otherwise.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron")
NEEDS = ("moments",)
COMPENSATES = True  # as published: without its bias the score says the wrong thing


def score(evidence: Evidence) -> Array:
    """[U]: mean over the unit's inputs of z_j, which is Var(x_j) |W_j|^2 standardized over all inputs of the group.

    Given as log(1 + e^z): above 0, in the same order.
    """
    assert evidence.moments is not None
    mean, square, _ = evidence.moments
    variance = np.maximum(square - mean**2, 0)
    by_input = variance * np.square(evidence.outgoing, dtype=np.float64).sum(axis=1)
    standard = (by_input - by_input.mean()) / (float(by_input.std()) or 1.0)
    return np.asarray(np.logaddexp(0.0, standard[evidence.positions].mean(axis=1)))
