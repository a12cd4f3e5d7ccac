"""MPNet (Song et al. 2020, arXiv 2004.09297): BERT with a position bias per head that all layers share."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _encoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("mpnet",)

PARTS = _encoder.Parts(
    head=("classifier",),
    layer={
        **_encoder.BERT_LAYER,
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "output": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        "attention": "attention.attn",
    },
    token_types=False,
    position_bias="encoder",
)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a MPNetModel or MPNetForSequenceClassification."""
    return _encoder.describe(model, family="mpnet", task=task, pooling=pooling, normalize=normalize, parts=PARTS)
