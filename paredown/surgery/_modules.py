"""What stands where something was cut away, so that the stock forward pass of transformers still works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Headless(nn.Module):
    """An attention module without heads: its context is empty, so only the output projection's bias is left.

    It keeps the children of the module it replaces under their names. `output` names the output projection where it
    is one of them (DistilBERT, MPNet); otherwise the layer applies it (BERT) to the empty context.
    """

    def __init__(self, attention: nn.Module, output: str):
        super().__init__()
        self.output_name = output
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.train(attention.training)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        context = hidden_states[..., :0]
        return (self.get_submodule(self.output_name)(context) if self.output_name else context), None


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
