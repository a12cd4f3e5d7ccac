"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("mistral",)

PARTS = _decoder.Parts()


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Mistral model for causal language."""
    return _decoder.describe(model, family="mistral", parts=PARTS)
