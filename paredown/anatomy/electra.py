"""ELECTRA (Clark et al. 2020, arXiv 2003.10555)."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from paredown.anatomy import _encoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("electra",)

PARTS = _encoder.Parts(head=("classifier",), unused=())


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of an ElectraModel or ElectraForSequenceClassification."""
    parts = PARTS
    if model.config.embedding_size != model.config.hidden_size:  # the small models embed narrower than they compute
        parts = dataclasses.replace(PARTS, embeddings=("embeddings", "embeddings_project"))
    return _encoder.describe(model, family="electra", task=task, pooling=pooling, normalize=normalize, parts=parts)
