"""Every other layer goes, whatever the data says (DistilBERT, Sanh et al. 2019, arXiv:1910.01108)."""

import numpy as np

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer",)
NEEDS: tuple[str, ...] = ()


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: where `drop` layers go, those are spread evenly and neither the first nor the last is among them.

    Below a half of the layers that is every other one; beyond, what stays is spread evenly, first and last included.
    """
    count = len(evidence.places) - 1
    stays = max(count - max(evidence.drop, 1), 1)
    kept = np.unique(np.round(np.linspace(0, count - 1, stays)).astype(int)) if stays > 1 else np.asarray([count - 1])
    values = np.arange(count, dtype=np.float64) / count
    values[kept] += 1.0
    return values
