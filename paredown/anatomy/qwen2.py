"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("qwen2",)

PARTS = _decoder.Parts()


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Qwen2 model for causal language."""
    return _decoder.describe(model, family="qwen2", parts=PARTS)
