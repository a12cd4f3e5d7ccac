"""The anatomy of every pre-norm causal language model, from the names of its parts.

Legend: L layers, Q query heads and KV key-value heads of one layer, G = Q / KV query heads per group, K head size,
F neurons of one layer, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from paredown.encoder import blocks_of, inputs_of
from paredown.errors import UnsupportedModel
from paredown.models import fingerprint
from paredown.types import Anatomy, Array, Counter, Group, Layout, Slice

LLAMA_LAYER: Mapping[str, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention": "self_attn",
    "ffn": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_LAYER: Mapping[str, str] = {
    **LLAMA_LAYER,
    "after_attention": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "after_ffn": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Parts:
    """What one family calls its parts. Names in `layer` are relative to one layer; "fused" is Q, K and V in one.

    `counters` are integers of the attention module that follow the groups of heads: the entries per head, where 0
    stands for the head size K.
    """

    layers: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    head: tuple[str, ...] = ("model.norm", "lm_head")
    layer: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER)
    counters: tuple[tuple[str, int], ...] = ()
    rotary: str = "model.rotary_emb"


def describe(model: PreTrainedModel, *, family: str, parts: Parts, logit_cap: float | None = None) -> Anatomy:
    """Groups "layers", "layer.{i}.heads", "layer.{i}.queries" and "layer.{i}.neurons", and the layout to compute with.

    A unit of "heads" is a key-value head with all query heads that read it; a unit of "queries" (only where a group has
    more than one) is one query head out of every group. Both can be cut together, and any of it leaves a model that
    generates. Widths are read off the weights. Raises `UnsupportedModel` for cross-attention and missing parts.
    """
    config: Any = model.config
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"this {family} model has cross-attention, which Paredown does not cut")
    names = {name for name, _ in model.named_modules()}
    for name in (parts.layers, *parts.embeddings, *parts.head):
        if name not in names:
            raise UnsupportedModel(f"{type(model).__name__} has no module {name!r}; give a model for causal language")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layout = Layout(
        layers=parts.layers,
        embeddings=parts.embeddings,
        layer_names=dict(parts.layer),
        num_heads=config.num_attention_heads,
        head_dim=int(head_dim),
        width=config.hidden_size,
        activation="",  # the family's own FFN is called
        token_types=False,
        pooling="tokens",
        head=parts.head,
        rotary=parts.rotary,
        logit_cap=float(logit_cap or 0.0),
    )
    blocks = blocks_of(model, layout)
    groups = [Group("layers", "layer", len(blocks), (), (), blocks=layout.layers, minimum=1)]
    for i, block in enumerate(blocks):
        groups += _layer_groups(block, i, layout, parts)
    return Anatomy(family, fingerprint(model), tuple(groups), layout)


def _layer_groups(block: nn.Module, i: int, layout: Layout, parts: Parts) -> list[Group]:
    prefix, role, size = f"{layout.layers}.{i}.", layout.layer_names, layout.head_dim
    queries = inputs_of(block.get_submodule(role["output"]))
    heads, rest = divmod(queries, size)
    if rest:
        raise UnsupportedModel(f"{prefix}{role['output']} has {queries} inputs, not a multiple of {size}")
    attention = prefix + role["attention"]
    counters = tuple(Counter(attention, name, each or size) for name, each in parts.counters)
    groups: list[Group] = []
    if "fused" in role:  # [Q | K | V], as many heads of each
        per_head = np.arange(3 * queries).reshape(3, heads, size)
        fused = per_head.transpose(1, 0, 2).reshape(heads, 3 * size)
        consumer = np.arange(queries).reshape(heads, size)
        slices = (*_out(block, prefix, role["fused"], fused), _in(block, prefix, role["output"], consumer))
        groups.append(Group(f"layer.{i}.heads", "head", heads, slices, counters, layer=i))
    else:
        key: Any = block.get_submodule(role["key"])
        shared = int(key.weight.shape[0]) // size
        each = heads // max(shared, 1)
        by_group = np.arange(queries).reshape(shared, each * size)
        own = np.arange(shared * size).reshape(shared, size)
        slices = (
            *_out(block, prefix, role["query"], by_group),
            *_out(block, prefix, role["key"], own),
            *_out(block, prefix, role["value"], own),
            _in(block, prefix, role["output"], by_group),
        )
        groups.append(Group(f"layer.{i}.heads", "head", shared, slices, counters, layer=i))
        if each > 1:
            by_query = np.arange(queries).reshape(shared, each, size).transpose(1, 0, 2).reshape(each, shared * size)
            slices = (*_out(block, prefix, role["query"], by_query), _in(block, prefix, role["output"], by_query))
            follows = (Counter(attention, "num_key_value_groups", 1),)
            groups.append(Group(f"layer.{i}.queries", "query", each, slices, follows, minimum=1, layer=i))
    neurons = inputs_of(block.get_submodule(role["down"]))
    positions = np.arange(neurons).reshape(neurons, 1)
    producers = [part for name in ("gate", "up") if name in role for part in _out(block, prefix, role[name], positions)]
    slices = (*producers, _in(block, prefix, role["down"], positions))
    groups.append(Group(f"layer.{i}.neurons", "neuron", neurons, slices, layer=i))
    return groups


def _out(block: nn.Module, prefix: str, name: str, positions: Array) -> list[Slice]:
    """The slices of a projection's outputs: a Linear's weight is [out, in], that of GPT-2's Conv1D [in, out]."""
    projection: Any = block.get_submodule(name)
    axis = 0 if isinstance(projection, nn.Linear) else 1
    found = [Slice(f"{prefix}{name}.weight", axis, positions, "producer")]
    return found if projection.bias is None else [*found, Slice(f"{prefix}{name}.bias", 0, positions, "producer")]


def _in(block: nn.Module, prefix: str, name: str, positions: Array) -> Slice:
    axis = 1 if isinstance(block.get_submodule(name), nn.Linear) else 0
    return Slice(f"{prefix}{name}.weight", axis, positions, "consumer")
