"""Exact free folds: what can be computed once instead of at every token, before anything is cut.

Source: softmax ignores a constant per query, and the rows of an attention matrix sum to one.
Legend: D model width, N concatenated head outputs.
"""

from __future__ import annotations

import torch

from paredown.encoder import Model, blocks_of, copied, linear_of
from paredown.types import Anatomy


def fold(model: Model, anatomy: Anatomy) -> tuple[Model, tuple[str, ...]]:
    """A copy that computes the same with key and value biases zero and unused modules gone; what was done, in words.

    q (k + b) = q k + (q b), the same for every key: the key bias goes. The value bias b_v [N] reaches the output as
    W_o b_v: it moves into the output bias [D]. Modules that the task never reads (a sentence encoder's pooler) become
    None. The embeddings are shared. On the meta device only the last is done. Folding twice changes nothing. A decoder
    comes back as it is.
    """
    layout = anatomy.layout
    if layout.pooling == "tokens":  # rotary positions come between a key and its bias, and outputs have no bias
        return copied(model, layout), ()
    folded = copied(model, layout)
    keys = values = 0
    with torch.no_grad():
        for block in blocks_of(folded, layout):
            key, value, output = (linear_of(block, layout, role) for role in ("key", "value", "output"))
            if key.weight.is_meta:
                continue
            if key.bias is not None and key.bias.any():
                key.bias.zero_()
                keys += 1
            if value.bias is not None and output.bias is not None and value.bias.any():
                moved = output.weight.double() @ value.bias.double()
                output.bias.copy_(output.bias.double() + moved)
                value.bias.zero_()
                values += 1
    done = []
    if keys:
        done.append(f"key biases dropped in {keys} layers")
    if values:
        done.append(f"value biases moved into the output biases of {values} layers")
    for name in layout.unused:
        parent, _, attribute = name.rpartition(".")
        owner = folded.get_submodule(parent)
        if getattr(owner, attribute, None) is not None:
            setattr(owner, attribute, None)
            done.append(f"{name} dropped, which this task never reads")
    return folded, tuple(done)
