"""Sparse tensors in safetensors: a bit per weight says which are not zero, and those follow each other.

At a share s of zeros a float32 matrix takes 1/32 + (1 - s) of its size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

WORTH = 0.25  # share of zeros from which a tensor is stored so
BITS, VALUES = ".bits", ".values"


def compressed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors to write, sparse float matrices as `name.bits` (uint8, rows after each other, first weight in the
    highest bit) and `name.values`; and the shapes of those by name.
    """
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        there = tensor != 0
        if tensor.dim() < 2 or not tensor.numel() or float(there.float().mean()) > 1 - WORTH:
            found[name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        found[name + BITS] = torch.from_numpy(np.packbits(there.numpy().ravel()))
        found[name + VALUES] = tensor[there]
    return found, shapes


def expanded(state: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The reverse. Raises KeyError and ValueError where parts are missing or do not fit."""
    parts = {name + part for name in shapes for part in (BITS, VALUES)}
    found = {name: tensor for name, tensor in state.items() if name not in parts}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        bits, values = state[name + BITS].numpy(), state[name + VALUES]
        if len(bits) != (size + 7) // 8:
            raise ValueError(f"{name} has {len(bits)} bytes of bits and {size} weights")
        there = torch.from_numpy(np.unpackbits(bits, count=size).view(bool))
        if int(there.sum()) != len(values):
            raise ValueError(f"{name} has {len(values)} values for {int(there.sum())} places")
        tensor = torch.zeros(size, dtype=values.dtype)
        tensor[there] = values
        found[name] = tensor.reshape(shape)
    return found
