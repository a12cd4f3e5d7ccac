"""GPT-2 (Radford et al. 2019): learned positions, queries, keys and values in one projection, transposed weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("gpt2",)

PARTS = _decoder.Parts(
    layers="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    head=("transformer.ln_f", "lm_head"),
    layer={
        "fused": "attn.c_attn",
        "output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attention": "attn",
        "ffn": "mlp",
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
    },
    counters=(("num_heads", 1), ("split_size", 0)),
    rotary="",
)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a GPT2LMHeadModel."""
    return _decoder.describe(model, family="gpt2", parts=PARTS)
