"""How much a unit writes: the norm of what it adds to the stream.

For a neuron this is the root mean square of its activation times the norm of its outgoing weights; for a head it counts
what its inputs do together, which column-wise measures leave out.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron")
NEEDS = ("head_gram", "moments")


def score(evidence: Evidence) -> Array:
    """[U]: root of the mean over tokens of |x_u W_u|^2, that is of tr(W_u' E[x_u x_u'] W_u)."""
    at = evidence.positions
    rows = evidence.outgoing[at].astype(np.float64)  # [U, S, D]
    if at.shape[1] == 1:  # neurons, of one input each: no products of two
        assert evidence.moments is not None
        return np.asarray(np.sqrt(evidence.moments[1][at] * np.square(rows).sum(-1))[:, 0])
    assert evidence.gram is not None
    blocks = evidence.gram[at[:, :, None], at[:, None, :]] / max(evidence.rows, 1)  # [U, S, S]
    return np.asarray(np.sqrt(np.maximum(np.einsum("usd,ust,utd->u", rows, blocks, rows, optimize=True), 0)))
