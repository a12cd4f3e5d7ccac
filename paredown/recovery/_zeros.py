"""Weights that are zero stay zero while a sparse model is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SPARSE = 0.01  # of a matrix: from this share of zeros on they are there on purpose


class Zeros:
    """Where the matrices among `trained` are zero now; `keep` puts those zeros back, after every step."""

    def __init__(self, trained: Mapping[str, Tensor]):
        self.held: list[tuple[Tensor, Tensor]] = []
        for value in trained.values():
            zero = value.detach() == 0
            if value.dim() >= 2 and value.numel() and float(zero.float().mean()) >= SPARSE:
                self.held.append((value, zero))

    def keep(self) -> None:
        with torch.no_grad():
            for value, zero in self.held:
                value.masked_fill_(zero.to(value.device), 0.0)
