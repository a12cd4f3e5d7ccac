"""BERT (Devlin et al. 2018, arXiv 1810.04805), MiniLM and the many encoders of the same make."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _encoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("bert",)

PARTS = _encoder.Parts(head=("{base}.pooler", "classifier"))


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a BertModel or BertForSequenceClassification."""
    return _encoder.describe(model, family="bert", task=task, pooling=pooling, normalize=normalize, parts=PARTS)
