"""A model as the stages compute with it: in steps, whatever its family is.

Legend: B batch, T tokens, D model width, X inputs of an output projection, N rows of output.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from paredown.decoder import Decoder
from paredown.encoder import Encoder
from paredown.types import Layout


class Forward(Protocol):
    """Whatever answers a batch of tokens: a `Network`, or an encoder that leaves tokens out."""

    @property
    def output_name(self) -> str:
        """ "logits" or "embeddings"."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of the arrays that a batch must hold."""

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The output [N, ...]: a row per text, or per real token of a language model."""


class LayerSteps(Protocol):
    """One layer as functions of the residual stream; `mask` is what the network's own `mask` gave."""

    num_heads: int
    num_neurons: int

    @property
    def output(self) -> nn.Module:
        """Attention's output projection."""

    @property
    def down(self) -> nn.Module:
        """The FFN's output projection."""

    @property
    def after_attention(self) -> nn.Module | None:
        """A norm between attention's projection and the stream, if there is one."""

    @property
    def after_ffn(self) -> nn.Module | None:
        """The same of the FFN."""

    def context(self, x: Tensor, mask: Any, first_only: bool = False) -> Tensor:
        """The input of attention's output projection [B, T, X]."""

    def hidden(self, x: Tensor) -> Tensor:
        """The input of the FFN's output projection [B, T, X]."""

    def probabilities(self, x: Tensor, mask: Any, first_only: bool = False) -> Tensor:
        """Where each head looks [B, H, T, T]."""

    def attention_output(self, x: Tensor, mask: Any, first_only: bool = False) -> Tensor:
        """What attention's output projection gives [B, T, D]; [D] where only a bias is left of it."""

    def ffn_output(self, x: Tensor) -> Tensor:
        """What the FFN's output projection gives, likewise."""

    def join_attention(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after attention, from the one before and what its projection gave."""

    def join_ffn(self, x: Tensor, added: Tensor) -> Tensor:
        """The same of the FFN."""

    def attend(self, x: Tensor, mask: Any, first_only: bool = False) -> Tensor:
        """The whole attention sub-layer."""

    def feed(self, x: Tensor) -> Tensor:
        """The whole FFN sub-layer."""


class Network(Protocol):
    """A whole model; `Encoder` and `Decoder` are the two there are."""

    model: nn.Module
    layout: Layout

    @property
    def output_name(self) -> str:
        """ "logits" or "embeddings"."""

    @property
    def layers(self) -> Sequence[LayerSteps]:
        """Bottom-up."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of the arrays that a batch must hold."""

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The stream that enters the first layer [B, T, D]."""

    def mask(self, x: Tensor, attention_mask: Tensor) -> Any:
        """What the layers are given beside the stream."""

    def step(self, index: int, x: Tensor, mask: Any) -> Tensor:
        """The stream after a layer."""

    def forward_from(self, start: int, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The output [N, ...], given the stream that enters layer `start`."""

    def without(
        self, *, layers: Collection[int] = (), heads: Collection[int] = (), neurons: Collection[int] = ()
    ) -> Network:
        """A view that leaves out whole layers, and the heads or the neurons of others."""

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The output [N, ...]: a row per text, or per real token of a language model."""


def network(model: nn.Module, layout: Layout) -> Network:
    """The model seen through its layout: a `Decoder` where every token has an output of its own, else an `Encoder`."""
    return Decoder(model, layout) if layout.pooling == "tokens" else Encoder(model, layout)
