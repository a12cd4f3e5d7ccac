"""One forward pass for every pre-norm causal language model, in the steps that `paredown.encoder` has for encoders.

The attention and the FFN of the transformers model are called as they are, so rotary positions, grouped queries, norms
of queries and keys, sliding windows and soft caps are the family's own; this file only knows in which order the parts
come. Like `Encoder` it owns no weights, and reads widths off the weights.

Legend: B batch, T tokens, N real tokens of the batch, D model width, H query heads of this layer, K head size,
F neurons of this layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.encoder import blocks_of, inputs_of
from paredown.types import Layout

LOGIT_ROWS = 512  # of logits held at a time: a vocabulary of 150,000 takes 300 MB then


@dataclass(frozen=True)
class Context:
    """What the layers of a type get beside the stream: the additive mask [B, 1, T, T], and rotary (cos, sin)."""

    masks: Mapping[str, Tensor]
    rotary: Mapping[str, tuple[Tensor, Tensor] | None]


class Block:
    """The parts of one decoder layer and its two sub-layers as pure functions of the residual stream."""

    def __init__(self, module: nn.Module, layout: Layout, kind: str):
        names = layout.layer_names
        part = {role: module.get_submodule(name) for role, name in names.items()}
        self.attention, self.ffn = part["attention"], part["ffn"]
        self.attention_norm, self.ffn_norm = part["attention_norm"], part["ffn_norm"]
        self.after_attention, self.after_ffn = part.get("after_attention"), part.get("after_ffn")
        self.output_name, self.down_name = names["output"], names["down"]
        self.module, self.kind = module, kind
        self.num_heads = inputs_of(part["output"]) // layout.head_dim
        self.num_neurons = inputs_of(part["down"])
        self.rotary = bool(layout.rotary)

    @property
    def output(self) -> nn.Module:
        return self.module.get_submodule(self.output_name)

    @property
    def down(self) -> nn.Module:
        return self.module.get_submodule(self.down_name)

    def _attend(self, x: Tensor, mask: Context) -> tuple[Tensor, Tensor | None]:
        positions = {"position_embeddings": mask.rotary[self.kind]} if self.rotary else {}
        found = self.attention(self.attention_norm(x), attention_mask=mask.masks[self.kind], **positions)
        return cast(tuple[Tensor, Tensor | None], found[:2])

    def context(self, x: Tensor, mask: Context, first_only: bool = False) -> Tensor:
        """The heads' outputs side by side [B, T, H*K]: the input of the output projection."""
        return _input_of(self.output, lambda: self._attend(x, mask))

    def hidden(self, x: Tensor) -> Tensor:
        """The FFN's activations [B, T, F]: the input of the down projection."""
        return _input_of(self.down, lambda: self.ffn(self.ffn_norm(x)))

    def probabilities(self, x: Tensor, mask: Context, first_only: bool = False) -> Tensor:
        """Where each head looks [B, H, T, T]: eager attention alone tells."""
        config = cast(Any, self.attention).config
        usual, config._attn_implementation = config._attn_implementation, "eager"
        try:
            weights = self._attend(x, mask)[1]
        finally:
            config._attn_implementation = usual
        assert weights is not None
        return weights

    def attention_output(self, x: Tensor, mask: Context, first_only: bool = False) -> Tensor:
        """What the output projection gives; without heads only its bias is left."""
        return self._attend(x, mask)[0] if self.num_heads else _bias(self.output, x)

    def ffn_output(self, x: Tensor) -> Tensor:
        """What the down projection gives; without neurons only its bias is left."""
        return cast(Tensor, self.ffn(self.ffn_norm(x))) if self.num_neurons else _bias(self.down, x)

    def join_attention(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after attention, from the one before and what its projection gave."""
        return x + (self.after_attention(added) if self.after_attention else added)

    def join_ffn(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after the FFN, from the one before and what its projection gave."""
        return x + (self.after_ffn(added) if self.after_ffn else added)

    def attend(self, x: Tensor, mask: Context, first_only: bool = False) -> Tensor:
        """Attention sub-layer with its norms and the residual."""
        return self.join_attention(x, self.attention_output(x, mask))

    def feed(self, x: Tensor) -> Tensor:
        """FFN sub-layer with its norms and the residual."""
        return self.join_ffn(x, self.ffn_output(x))


def _input_of(module: nn.Module, run: Any) -> Tensor:
    """What `run` hands to a module."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def _bias(projection: nn.Module, like: Tensor) -> Tensor:
    bias: Tensor | None = getattr(projection, "bias", None)
    return like.new_zeros(like.shape) if bias is None else bias.expand_as(like)


class Decoder(nn.Module):
    """A transformers causal language model seen through its `Layout`; the output is logits of real tokens [N, V].

    The tokens of a text come one after another, texts in the order of the batch; padding is on the right.
    """

    output_name = "logits"

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__()
        self.model = model
        self.layout = layout
        config = cast(Any, model).config
        blocks = blocks_of(model, layout)
        self.kinds: list[str] = list(getattr(config, "layer_types", None) or ["full_attention"] * len(blocks))
        self.layers = [Block(module, layout, kind) for module, kind in zip(blocks, self.kinds, strict=True)]
        self.window: int | None = getattr(config, "sliding_window", None)
        if not getattr(config, "layer_types", None) and self.window:  # Mistral: every layer slides
            self.kinds = ["sliding_attention"] * len(blocks)
            for block in self.layers:
                block.kind = "sliding_attention"

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask")

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The stream that enters the first layer [B, T, D]."""
        table, *positions = (self.model.get_submodule(name) for name in self.layout.embeddings)
        x: Tensor = table(input_ids)
        for learned in positions:
            x = x + learned(torch.arange(x.shape[1], device=x.device))
        return x

    def mask(self, x: Tensor, attention_mask: Tensor) -> Context:
        """Causal masks without padding, one for each type of layer, and rotary positions."""
        tokens = x.shape[1]
        at = torch.arange(tokens, device=x.device)
        ahead = at[None, :] > at[:, None]
        gone = attention_mask[:, None, None, :] == 0
        least = torch.finfo(torch.float32).min  # eager attention does its softmax in float32, also in a float64 model
        masks, rotary = {}, {}
        for kind in dict.fromkeys(self.kinds):
            hidden = ahead
            if kind == "sliding_attention" and self.window is not None:
                hidden = ahead | (at[:, None] - at[None, :] >= self.window)
            masks[kind] = x.new_zeros(len(x), 1, tokens, tokens).masked_fill(hidden | gone, least)
            rotary[kind] = self._rotary(x, at[None], kind)
        return Context(masks, rotary)

    def _rotary(self, x: Tensor, at: Tensor, kind: str) -> tuple[Tensor, Tensor] | None:
        if not self.layout.rotary:
            return None
        module = self.model.get_submodule(self.layout.rotary)
        by_type = hasattr(module, f"{kind}_inv_freq")  # Gemma 3 turns at another speed in sliding layers
        return cast(tuple[Tensor, Tensor], module(x, at, kind) if by_type else module(x, at))

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the real tokens [N, V], from the last layer's stream."""
        return self._logits(x[attention_mask.bool()])

    def _logits(self, rows: Tensor) -> Tensor:
        for name in self.layout.head:
            rows = self.model.get_submodule(name)(rows)
        cap = self.layout.logit_cap
        return torch.tanh(rows / cap) * cap if cap else rows

    def log_likelihood(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of every next token, in nats [B, T-1]; 0 where padding comes next. Logits are never held of a whole batch."""
        x = self.embed(input_ids)
        mask = self.mask(x, attention_mask)
        for index in range(len(self.layers)):
            x = self.step(index, x, mask)
        followed = attention_mask[:, 1:].bool()
        rows, following = x[:, :-1][followed].split(LOGIT_ROWS), input_ids[:, 1:][followed].split(LOGIT_ROWS)
        parts = [-F.cross_entropy(self._logits(r), f, reduction="none") for r, f in zip(rows, following, strict=True)]
        found = x.new_zeros(followed.shape)
        found[followed] = torch.cat(parts) if parts else x.new_zeros(0)
        return found

    def without(
        self, *, layers: Collection[int] = (), heads: Collection[int] = (), neurons: Collection[int] = ()
    ) -> Decoder:
        """A view of the same modules that leaves out whole layers, and the heads or the neurons of others."""
        view = Decoder(self.model, self.layout)
        for i, layer in enumerate(view.layers):
            layer.num_heads = 0 if i in heads else layer.num_heads
            layer.num_neurons = 0 if i in neurons else layer.num_neurons
        view.layers = [layer for i, layer in enumerate(view.layers) if i not in layers]
        return view

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.forward_from(0, self.embed(input_ids), attention_mask)

    def forward_from(self, start: int, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The output, given the stream that enters layer `start`."""
        mask = self.mask(x, attention_mask)
        for index in range(start, len(self.layers)):
            x = self.step(index, x, mask)
        return self.pool(x, attention_mask)

    def step(self, index: int, x: Tensor, mask: Context) -> Tensor:
        """The stream after a layer."""
        layer = self.layers[index]
        return layer.feed(layer.attend(x, mask))

    def train(self, mode: bool = True) -> Decoder:
        """Stays in eval mode: recovery works against a deterministic teacher."""
        super().train(False)
        return self

    def extra_repr(self) -> str:
        widths: list[Any] = [(layer.num_heads, layer.num_neurons) for layer in self.layers]
        return f"heads and neurons per layer: {widths}"
