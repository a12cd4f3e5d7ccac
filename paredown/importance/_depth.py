"""What depth does to a model: its stream from place to place, and its answers without some of its layers.

Legend: B batch, T tokens, D width, N rows (real tokens), P places of the stream, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from paredown.calibration import Batch, distance, evaluating, real_rows, tensors
from paredown.importance._evidence import Streams
from paredown.network import Network
from paredown.tasks import pad

FEWEST = 8  # texts


def streams(encoder: Network, batches: Sequence[Batch]) -> Streams:
    """Differences between all places of the stream, over all real tokens. Cost: about one forward pass.

    All of them come from each token's [P, P] products x_p' x_q, so memory is P^2 figures per token of one batch. The
    angle of a decoder is that of a text's last token.
    """
    sums: list[Tensor] = []
    rows = texts = 0
    with torch.inference_mode(), evaluating(encoder.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            mask = inputs["attention_mask"]
            stacked = torch.stack([real_rows(x, mask) for x in _places(encoder, inputs)], dim=1)  # [N, P, D]
            products = stacked @ stacked.transpose(1, 2)
            owner = mask.nonzero()[:, 0]
            by_text = products.new_zeros(len(mask), *products.shape[1:]).index_add_(0, owner, products)
            cosine, flat = _cosine(products), _cosine(by_text)
            squares = products.diagonal(dim1=1, dim2=2)
            distance = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp(min=0).sqrt()
            angles = cosine.clamp(-1, 1).arccos() / torch.pi
            lengths = mask.sum(1)
            if encoder.layout.pooling == "tokens":
                angle = angles[lengths.cumsum(0) - 1]
            else:
                summed = angles.new_zeros(len(mask), *angles.shape[1:]).index_add_(0, owner, angles)
                angle = summed / lengths[:, None, None]
            found = [
                cosine.sum(0),
                flat.sum(0),
                angle.sum(0),
                (distance / squares.clamp(min=1e-24).sqrt()[:, :, None]).sum(0),
            ]
            sums = [a + b.double() for a, b in zip(sums or [torch.zeros(())] * 4, found, strict=True)]
            rows, texts = rows + len(products), texts + len(mask)
    means = [(one / count).numpy() for one, count in zip(sums, (rows, texts, texts, rows), strict=True)]
    return Streams(*means)


def _places(encoder: Network, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The stream [B, T, D] before each sub-layer and after the last, of all tokens."""
    x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
    mask = encoder.mask(x, inputs["attention_mask"])
    found = [x]
    for layer in encoder.layers:
        found.append(layer.attend(found[-1], mask))
        found.append(layer.feed(found[-1]))
    return found


def _cosine(products: Tensor) -> Tensor:
    norms = products.diagonal(dim1=1, dim2=2).clamp(min=1e-24).sqrt()
    return products / (norms[:, :, None] * norms[:, None, :])


def removal(encoder: Network, batches: Sequence[Batch], *, sub_layers: bool) -> Callable[[Collection[int]], float]:
    """A function from layers (or sub-layers: attention of layer i is 2i, its FFN 2i + 1) to the divergence without."""
    inputs = [tensors(batch, encoder) for batch in batches]
    with torch.inference_mode(), evaluating(encoder.model):
        wanted = [encoder(**one) for one in inputs]

    def without(pieces: Collection[int]) -> float:
        if sub_layers:
            heads, neurons = ([p // 2 for p in pieces if p % 2 == kind] for kind in (0, 1))
            view = encoder.without(heads=heads, neurons=neurons)
        else:
            view = encoder.without(layers=pieces)
        with torch.inference_mode(), evaluating(encoder.model):
            outputs = [view(**one) for one in inputs]
            found = [distance(*pair, encoder.output_name) for pair in zip(outputs, wanted, strict=True)]
        return float(torch.cat(found).mean())

    return without


def thinned(encoder: Network, batches: Sequence[Batch], share: float) -> list[Batch]:
    """About this share of the texts, evenly spread, FEWEST at least if they are there: for what needs many passes.

    They come in as few batches as texts of like lengths allow, without labels.
    """
    texts = [
        ids[:count]
        for batch in batches
        for ids, count in zip(batch["input_ids"], np.asarray(batch["attention_mask"]).sum(axis=1), strict=True)
    ]
    count = min(len(texts), max(FEWEST, round(len(texts) * share)))
    chosen = sorted((texts[i] for i in np.linspace(0, len(texts) - 1, count).round().astype(int)), key=len)
    size, names = max(map(len, (batch["input_ids"] for batch in batches))), [n for n in batches[0] if n != "labels"]
    padding = cast(Any, encoder.model).config.pad_token_id or 0
    return [pad(chosen[i : i + size], pad_id=padding, input_names=names) for i in range(0, count, size)]
