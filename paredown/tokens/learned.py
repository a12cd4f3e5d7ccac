"""A linear gate on the hidden state, x . w, fitted per stage so that the pruned model answers as the dense one.

How: see `fit_gates` of `paredown.tokens`. TR-BERT (Ye et al. 2021, arXiv:2105.11618) and Transkimmer (Guan et al.
2022, arXiv:2205.07324) learn such gates together with the model; here the model stays as it is.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("stream", "gate")


def score(seen: Seen) -> Tensor:
    """[G, n]"""
    return (cast(Tensor, seen.stream) * cast(Tensor, seen.gate)).sum(-1)
