"""Token merging (ToMe: Bolya et al. 2023, arXiv:2210.09461, section 3): alike tokens become one, their mean.

Legend: G texts of one length, n tokens of each, D model width, K head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def merged(x: Tensor, keys: Tensor, sizes: Tensor, special: Tensor, stay: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stream [G, n, D] and sizes [G, n] after merging, and which tokens are left, bool [G, n].

    Every token at an even place takes the most similar one at an odd place (cosine of `keys` [G, n, K]); the n - `stay`
    most similar of these pairs are merged, at the odd place, weighted by how many tokens each stands for. Special
    tokens take no part, and at most half of a text can go.
    """
    if x.shape[1] < 2:
        return x, sizes, torch.ones_like(special)
    metric = F.normalize(keys, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    barred = special[:, ::2, None] | special[:, None, 1::2]
    best, partner = similarity.masked_fill(barred, -math.inf).max(-1)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    leaves = (rank < x.shape[1] - stay) & best.isfinite()
    weight = (sizes[:, ::2] * leaves)[:, :, None]
    at = partner[:, :, None].expand(-1, -1, x.shape[2])
    odd = (x[:, 1::2] * sizes[:, 1::2, None]).scatter_add(1, at, x[:, ::2] * weight)
    grown = sizes[:, 1::2].scatter_add(1, partner, weight[:, :, 0])
    x, sizes, keep = x.clone(), sizes.clone(), torch.ones_like(special)
    changed = grown > sizes[:, 1::2]
    x[:, 1::2] = torch.where(changed[:, :, None], odd / grown[:, :, None], x[:, 1::2])
    sizes[:, 1::2] = grown
    keep[:, ::2] = ~leaves
    return x, sizes, keep
