"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108)."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown.anatomy import _encoder
from paredown.types import Anatomy

MODEL_TYPES: tuple[str, ...] = ("distilbert",)

PARTS = _encoder.Parts(
    head=("pre_classifier", "relu", "classifier"),
    layers="transformer.layer",
    layer={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "ffn_norm": "output_layer_norm",
        "attention": "attention",
    },
    counters=(("n_heads", 1),),
    depth=("transformer", "n_layers"),
    token_types=False,
    unused=(),
)


def describe(model: PreTrainedModel, *, task: str, pooling: str, normalize: bool) -> Anatomy:
    """The anatomy of a DistilBertModel or DistilBertForSequenceClassification."""
    return _encoder.describe(model, family="distilbert", task=task, pooling=pooling, normalize=normalize, parts=PARTS)
