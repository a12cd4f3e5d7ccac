"""Gemma 3, its language model (Gemma Team 2025, arXiv:2503.19786): Gemma 2 with norms on queries and keys."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("gemma3_text",)

PARTS = _decoder.Parts(layer=_decoder.GEMMA_LAYER)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Gemma3 model for causal language."""
    return _decoder.describe(model, family="gemma3", parts=PARTS, logit_cap=model.config.final_logit_softcapping)
