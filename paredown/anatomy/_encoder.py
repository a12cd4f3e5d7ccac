"""The anatomy of every post-LayerNorm text encoder, from the names of its parts.

Legend: L layers, H heads of one layer, K head size, F neurons of one layer, D model width, U units, S entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from paredown.encoder import ACTIVATIONS, blocks_of, linear_of
from paredown.errors import UnsupportedModel
from paredown.models import CLASSIFICATION, fingerprint, has_classifier
from paredown.types import Anatomy, Array, Counter, Group, Layout, Slice

BERT_LAYER: Mapping[str, str] = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
    "attention": "attention.self",
}


@dataclass(frozen=True)
class Parts:
    """What one family calls its parts. Names are relative to the base model, those of `layer` to one layer.

    `head` holds the modules from the pooled vector to the logits, named from the whole model; "{base}" stands for the
    base model's prefix. `counters` are integers of the attention module that follow the heads: the entries per head,
    where 0 stands for the head size K. `depth` names the module and attribute that count the layers, if any does.
    """

    head: tuple[str, ...]
    layers: str = "encoder.layer"
    embeddings: tuple[str, ...] = ("embeddings",)
    layer: Mapping[str, str] = field(default_factory=lambda: BERT_LAYER)
    counters: tuple[tuple[str, int], ...] = (("num_attention_heads", 1), ("all_head_size", 0))
    depth: tuple[str, str] | None = None
    token_types: bool = True
    position_bias: str = ""
    unused: tuple[str, ...] = ("pooler",)


def describe(model: PreTrainedModel, *, family: str, task: str, pooling: str, normalize: bool, parts: Parts) -> Anatomy:
    """Groups "layers", "layer.{i}.heads" and "layer.{i}.neurons" of every layer, and the layout to compute with.

    The widths are read off the weights, so a model that was cut before is described as it is now. Raises
    `UnsupportedModel` for decoders, relative positions, unknown activations and missing parts.
    """
    _refuse(model)
    classify = task == CLASSIFICATION
    base = f"{model.base_model_prefix}." if has_classifier(model) else ""
    names = [name for name, _ in model.named_modules()]
    layout = Layout(
        layers=base + parts.layers,
        embeddings=tuple(base + name for name in parts.embeddings),
        layer_names=dict(parts.layer),
        num_heads=model.config.num_attention_heads,
        head_dim=model.config.hidden_size // model.config.num_attention_heads,
        width=model.config.hidden_size,
        activation=_activation(model),
        token_types=parts.token_types,
        pooling="cls" if classify else pooling,
        head=tuple(name.format(base=model.base_model_prefix) for name in parts.head) if classify else (),
        normalize=normalize and not classify,
        position_bias=base + parts.position_bias if parts.position_bias else "",
        unused=() if classify else tuple(base + name for name in parts.unused if base + name in names),
    )
    for name in (layout.layers, *layout.embeddings, *(name for name in layout.head if name != "relu")):
        if name not in names:
            raise UnsupportedModel(f"{type(model).__name__} has no module {name!r}, which a {family} model needs")
    blocks = blocks_of(model, layout)
    depth = (Counter(base + parts.depth[0], parts.depth[1], 1),) if parts.depth else ()
    groups = [Group("layers", "layer", len(blocks), (), depth, blocks=layout.layers, minimum=1)]
    for i, block in enumerate(blocks):
        groups += _layer_groups(block, i, layout, parts)
    return Anatomy(family, fingerprint(model, ignore=layout.unused), tuple(groups), layout)


def _layer_groups(block: nn.Module, i: int, layout: Layout, parts: Parts) -> tuple[Group, Group]:
    prefix = f"{layout.layers}.{i}."
    role = layout.layer_names
    linear = {name: linear_of(block, layout, name) for name in ("query", "key", "value", "output", "up", "down")}

    def slices(producers: tuple[str, ...], consumer: str, positions: Array) -> tuple[Slice, ...]:
        found = []
        for name in producers:
            found.append(Slice(f"{prefix}{role[name]}.weight", 0, positions, "producer"))
            if linear[name].bias is not None:
                found.append(Slice(f"{prefix}{role[name]}.bias", 0, positions, "producer"))
        return (*found, Slice(f"{prefix}{role[consumer]}.weight", 1, positions, "consumer"))

    width, neurons = linear["query"].weight.shape[0], linear["up"].weight.shape[0]
    for name, axis, size in (("key", 0, width), ("value", 0, width), ("output", 1, width), ("down", 1, neurons)):
        if linear[name].weight.shape[axis] != size:
            raise UnsupportedModel(
                f"{prefix}{role[name]} has shape {tuple(linear[name].weight.shape)}, not {size} wide"
            )
    heads, rest = divmod(width, layout.head_dim)
    if rest:
        raise UnsupportedModel(f"{prefix}{role['query']} has {width} outputs, not a multiple of {layout.head_dim}")
    head_positions = np.arange(width).reshape(heads, layout.head_dim)  # [H, K]
    neuron_positions = np.arange(neurons).reshape(neurons, 1)  # [F, 1]
    attention = prefix + role["attention"]
    counters = tuple(Counter(attention, name, each or layout.head_dim) for name, each in parts.counters)
    return (
        Group(
            f"layer.{i}.heads",
            "head",
            heads,
            slices(("query", "key", "value"), "output", head_positions),
            counters,
            layer=i,
        ),
        Group(f"layer.{i}.neurons", "neuron", neurons, slices(("up",), "down", neuron_positions), layer=i),
    )


def _refuse(model: PreTrainedModel) -> None:
    config, family = model.config, model.config.model_type
    for flag in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if getattr(config, flag, False):
            raise UnsupportedModel(f"this {family} model is a decoder ({flag} is true); Paredown cuts text encoders")
    position = getattr(config, "position_embedding_type", None) or "absolute"
    if position != "absolute":  # transformers v5 ignores the key and would compute something else, silently
        raise UnsupportedModel(f"this {family} model has {position!r} positions; only absolute ones are supported")


def _activation(model: PreTrainedModel) -> str:
    name = getattr(model.config, "hidden_act", None) or getattr(model.config, "activation", None)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation is {name!r}; supported are {', '.join(sorted(ACTIVATIONS))}")
    return name
