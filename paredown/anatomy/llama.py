"""Llama (Touvron et al. 2023, arXiv:2307.09288) and the many decoders of the same make."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _decoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("llama",)

PARTS = _decoder.Parts()


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a Llama model for causal language."""
    return _decoder.describe(model, family="llama", parts=PARTS)
