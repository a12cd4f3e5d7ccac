"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): norms on queries and keys, whose scales all heads of a layer share."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("qwen3",)

PARTS = _decoder.Parts()


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Qwen3 model for causal language."""
    return _decoder.describe(model, family="qwen3", parts=PARTS)
