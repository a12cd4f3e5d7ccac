"""One forward pass for every post-LayerNorm text encoder, whatever its family and however it was cut.

Calibration, closed-form recovery, distillation and export all compute with `Encoder`. It borrows the modules of a
transformers model (it owns no weights, so training it trains the model) and reads the widths off the weights, so a
model with other widths in every layer, or with sub-layers gone, needs nothing special.

It does less work than the stock forward, exactly: with [CLS] pooling only the first row of the last layer is read, so
its queries, its output projection and its FFN are computed for that row alone.

Legend: B batch, T tokens, D model width, H heads of this layer, K head size, F neurons of this layer, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.types import Layout

Model = TypeVar("Model", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
_aten = torch.ops.aten
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {  # where no gradient needs what went in: a matrix of [N, F] less
    "gelu": _aten.gelu_,
    "gelu_new": lambda x: cast(Tensor, _aten.gelu_(x, approximate="tanh")),
    "gelu_pytorch_tanh": lambda x: cast(Tensor, _aten.gelu_(x, approximate="tanh")),
    "relu": F.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: F.silu(x, inplace=True),
}


def blocks_of(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The model's layers."""
    return cast(nn.ModuleList, model.get_submodule(layout.layers))


def linear_of(block: nn.Module, layout: Layout, role: str) -> nn.Linear:
    """The projection of one layer that plays a role: query key value output up down."""
    return cast(nn.Linear, block.get_submodule(layout.layer_names[role]))


def inputs_of(projection: nn.Module) -> int:
    """How many inputs a projection has: a Linear's weight is [out, in], that of GPT-2's Conv1D [in, out]."""
    weight = cast(Tensor, projection.weight)
    return weight.shape[1 if isinstance(projection, nn.Linear) else 0]


def admit_biases(model: nn.Module, names: Collection[str]) -> None:
    """Gives the Linear layers that have none a bias of zeros, for those of `names` that are missing in the model.

    Compensation adds biases to families that have none; a state that holds them needs them to be there.
    """
    for name in set(names) - model.state_dict().keys():
        owner, _, kind = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:  # no such part: loading the state will say so
            continue
        if kind == "bias" and isinstance(module, nn.Linear):
            zeros = module.weight.new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)


def copied(model: Model, layout: Layout) -> Model:
    """A copy whose embeddings lie in the same memory: no stage changes them, and they are most of a small model.

    They are parameters of the copy's own, so it can be frozen or trained without the model's taking notice.
    """
    tables = [table for name in layout.embeddings for table in model.get_submodule(name).parameters()]
    memo: dict[int, Any] = {id(table): nn.Parameter(table.detach(), table.requires_grad) for table in tables}
    return copy.deepcopy(model, memo)


class Layer:
    """The parts of one encoder layer and its two sub-layers as pure functions of the residual stream."""

    def __init__(self, module: nn.Module, layout: Layout):
        self.query, self.key, self.value, self.output, self.up, self.down = (
            linear_of(module, layout, role) for role in ("query", "key", "value", "output", "up", "down")
        )
        self.attention_norm, self.ffn_norm = (
            cast(nn.LayerNorm, module.get_submodule(layout.layer_names[role]))
            for role in ("attention_norm", "ffn_norm")
        )
        attention = module.get_submodule(layout.layer_names["attention"])
        self.head_dim = layout.head_dim
        self.num_heads = self.query.weight.shape[0] // layout.head_dim
        self.num_neurons = self.up.weight.shape[0]
        self.activation, self.activation_in_place = ACTIVATIONS[layout.activation], IN_PLACE[layout.activation]
        self.after_attention = self.after_ffn = None  # norms between a projection and the stream: decoders have them
        self.position_bias = bool(layout.position_bias)
        self.bias_heads = getattr(attention, "bias_heads", None)  # heads of the shared position bias still here

    def context(self, x: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """The heads' outputs side by side [B, T, H*K]: the input of the output projection."""
        q, k, mask = self._asked(x, mask, first_only)
        return _attention(q, k, self._split(self.value(x)), mask).transpose(1, 2).flatten(2)

    def _asked(self, x: Tensor, mask: Tensor, first_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, H, T, K], and the mask that belongs to them."""
        rows = x[:, :1] if first_only else x
        if self.position_bias:  # the mask is [B, H, T, T]
            mask = mask if self.bias_heads is None else mask[:, self.bias_heads]
            mask = mask[:, :, : rows.shape[1]] if first_only else mask
        return self._split(self.query(rows)), self._split(self.key(x)), mask

    def probabilities(self, x: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Where each head looks [B, H, T, T], or [B, H, 1, T] where only the first row is read."""
        q, k, mask = self._asked(x, mask, first_only)
        return (q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + mask).softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def hidden(self, x: Tensor) -> Tensor:
        """The FFN's activations [B, T, F]: the input of the down projection."""
        raised = self.up(x)
        return self.activation(raised) if torch.is_grad_enabled() else self.activation_in_place(raised)

    def attention_output(self, x: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """What attention adds to the stream; without heads only the output bias is left."""
        return self.attended(self.context(x, mask, first_only) if self.num_heads else None, x)

    def attended(self, context: Tensor | None, x: Tensor) -> Tensor:
        """The same, from the heads' outputs side by side; None where there are no heads."""
        return _bias(self.output, x) if context is None else cast(Tensor, self.output(context))

    def ffn_output(self, x: Tensor) -> Tensor:
        """What the FFN adds to the stream; without neurons only the output bias is left."""
        return cast(Tensor, self.down(self.hidden(x))) if self.num_neurons else _bias(self.down, x)

    def join_attention(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after attention, from the one before and what its projection gave."""
        return cast(Tensor, self.attention_norm(x + added))

    def join_ffn(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after the FFN, from the one before and what its projection gave."""
        return cast(Tensor, self.ffn_norm(x + added))

    def attend(self, x: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Attention sub-layer with residual and norm; of its first row alone if that is all that is read."""
        return self.join_attention(x[:, :1] if first_only else x, self.attention_output(x, mask, first_only))

    def feed(self, x: Tensor) -> Tensor:
        """FFN sub-layer with residual and norm."""
        return self.join_ffn(x, self.ffn_output(x))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K) + mask) v, each [B, H, T, K], by whichever route is fastest.

    The fused kernel is two to five times as fast at 256 tokens and keeps no scores, but its backward pass in bfloat16
    is twice to ten times as slow as plain products with a softmax in bfloat16 (measured, torch 2.13, AVX-512 with AMX).
    A graph for export is written out: every engine knows the plain pattern.
    """
    learning_in_half = torch.is_grad_enabled() and q.dtype == torch.bfloat16
    if not learning_in_half and not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)  # float32's least would round to -inf in bfloat16
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(2, 3) + mask
    with torch.autocast(q.device.type, enabled=False):  # it would do the softmax in float32, at four times the cost
        return scores.softmax(-1) @ v


def _bias(linear: nn.Linear, like: Tensor) -> Tensor:
    bias: Tensor | None = linear.bias
    return bias if bias is not None else torch.zeros((), dtype=like.dtype, device=like.device)


class Encoder(nn.Module):
    """A transformers encoder seen through its `Layout`. Inputs are int64 [B, T]; the output is `output_name`.

    Dropout is never applied: recovery works against a deterministic teacher.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__()
        self.model = model
        self.layout = layout
        self.layers = [Layer(module, layout) for module in blocks_of(model, layout)]
        self.output_name = "logits" if layout.head else "embeddings"

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask") + (("token_type_ids",) if self.layout.token_types else ())

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The stream that enters the first layer [B, T, D]."""
        first, *rest = (self.model.get_submodule(name) for name in self.layout.embeddings)
        x: Tensor = first(input_ids, token_type_ids=token_type_ids) if self.layout.token_types else first(input_ids)
        for module in rest:
            x = module(x)
        return x

    def mask(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """What is added to attention scores: [B, 1, 1, T], or [B, H, T, T] where the family has a position bias."""
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        if self.layout.position_bias:
            mask = mask + self.position_bias(x)
        return mask

    def position_bias(self, x: Tensor) -> Tensor:
        """[H, T, T], of a family that has one, for streams of this shape."""
        shared: Any = self.model.get_submodule(self.layout.position_bias)
        found: Tensor = shared.compute_position_bias(x)[0].to(x.dtype)
        return found

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, C], or embeddings [B, D], from the last layer's stream."""
        if self.layout.pooling == "cls":
            pooled = x[:, :1]
        else:
            weight = attention_mask[:, :, None].to(x.dtype)
            pooled = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-9)
        return self.finish(pooled)

    def finish(self, pooled: Tensor) -> Tensor:
        """Logits [B, C], or embeddings [B, D], from one vector per text [B, 1, D]."""
        for name in self.layout.head:
            pooled = F.relu(pooled) if name == "relu" else self.model.get_submodule(name)(pooled)
        out = pooled[:, 0] if pooled.dim() == 3 else pooled
        return F.normalize(out, dim=-1) if self.layout.normalize else out

    def without(
        self, *, layers: Collection[int] = (), heads: Collection[int] = (), neurons: Collection[int] = ()
    ) -> Encoder:
        """A view of the same modules that leaves out whole layers, and the heads or the neurons of others.

        What is left out of a layer leaves its bias and its norm, as a cut does.
        """
        view = Encoder(self.model, self.layout)
        for i, layer in enumerate(view.layers):
            layer.num_heads = 0 if i in heads else layer.num_heads
            layer.num_neurons = 0 if i in neurons else layer.num_neurons
        view.layers = [layer for i, layer in enumerate(view.layers) if i not in layers]
        return view

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.forward_from(0, self.embed(input_ids, token_type_ids), attention_mask)

    def forward_from(self, start: int, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The output, given the stream that enters layer `start`."""
        mask = self.mask(x, attention_mask)
        for index in range(start, len(self.layers)):
            x = self.step(index, x, mask)
        return self.pool(x, attention_mask)

    def step(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        """The stream after a layer; after the last one its first row alone if that is all that is read."""
        layer = self.layers[index]
        first_only = self.layout.pooling == "cls" and index == len(self.layers) - 1
        return layer.feed(layer.attend(x, mask, first_only))

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: the embeddings and the head hold dropout modules."""
        super().train(False)
        return self

    def extra_repr(self) -> str:
        widths: list[Any] = [(layer.num_heads, layer.num_neurons) for layer in self.layers]
        return f"heads and neurons per layer: {widths}"
