"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118).

Norms before and after each sub-layer, capped logits, a sliding window in every other layer.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("gemma2",)

PARTS = _decoder.Parts(layer=_decoder.GEMMA_LAYER)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Gemma2 model for causal language."""
    return _decoder.describe(model, family="gemma2", parts=PARTS, logit_cap=model.config.final_logit_softcapping)
