"""What stands where something was cut away, so that the stock forward pass of transformers still works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Headless(nn.Module):
    """An attention module without heads: its context is empty, so only the output projection's bias is left.

    It keeps the children of the module it replaces under their names. `output` names the output projection where it
    is one of them (DistilBERT, MPNet, decoders); otherwise the layer applies it (BERT) to the empty context. A decoder
    counts the tokens that it has seen by what its layers put into the cache, so a single zero goes there per token.
    """

    def __init__(self, attention: nn.Module, output: str):
        super().__init__()
        self.output_name = output
        for name, child in attention.named_children():
            self.add_module(name, child)
        if isinstance(getattr(attention, "layer_idx", None), int):
            self.layer_idx: int = attention.layer_idx  # type: ignore[assignment]
        self.train(attention.training)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            seen = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(seen, seen, self.layer_idx)
        if not self.output_name:
            return hidden_states[..., :0], None
        return bias_alone(self.get_submodule(self.output_name), hidden_states), None


class Idle(nn.Module):
    """An FFN without neurons, of which only the bias of its projection is left; its children keep their names."""

    def __init__(self, ffn: nn.Module, down: str):
        super().__init__()
        self.down_name = down
        for name, child in ffn.named_children():
            self.add_module(name, child)
        self.train(ffn.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return bias_alone(self.get_submodule(self.down_name), hidden_states)


def bias_alone(projection: nn.Module, like: Tensor) -> Tensor:
    """What a projection gives for no inputs at all, in the shape of the stream [B, T, D]."""
    bias: Tensor | None = getattr(projection, "bias", None)
    return like.new_zeros(like.shape) if bias is None else bias.expand_as(like)


class Skipped(nn.Module):
    """A layer that hands its input on, in the form (tensor or tuple) in which the layer hands on its output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def keep_bias_heads(attention: nn.Module, heads: tuple[int, ...]) -> None:
    """Lets an attention module read only its own heads of the position bias [B, H, T, T] that all layers share.

    They are kept as the buffer `bias_heads`, counted as the bias counts them, also when a cut follows a cut.
    """
    index = torch.tensor(heads, dtype=torch.long)
    before = getattr(attention, "bias_heads", None)
    attention.register_buffer("bias_heads", index if before is None else before[index], persistent=False)
    if before is None:
        attention.register_forward_pre_hook(_select_bias, with_kwargs=True)


def _select_bias(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # (hidden_states, attention_mask, position_bias) is how MPNetAttention calls MPNetSelfAttention
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": kwargs["position_bias"][:, module.bias_heads]}
    elif len(args) > 2 and args[2] is not None:
        args = (*args[:2], args[2][:, module.bias_heads], *args[3:])
    return args, kwargs
