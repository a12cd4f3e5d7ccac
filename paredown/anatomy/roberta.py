"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and XLM-RoBERTa (Conneau et al. 2019, arXiv 1911.02116)."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _encoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("roberta", "xlm-roberta")

PARTS = _encoder.Parts(
    head=("classifier",),
    token_types=False,  # one token type only, which the embeddings add by themselves
)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of an (XLM-)RobertaModel or (XLM-)RobertaForSequenceClassification."""
    return _encoder.describe(model, family="roberta", task=task, pooling=pooling, normalize=normalize, parts=PARTS)
