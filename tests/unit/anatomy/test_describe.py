"""What anatomy refuses, and what it reads off a model."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from paredown.anatomy import describe
from paredown.errors import UnsupportedModel
from tests.contracts.families import FAMILIES, config_of, tiny


def test_an_unknown_family_is_named_and_the_known_ones_listed() -> None:
    config = AutoConfig.for_model(
        "albert", hidden_size=16, num_attention_heads=2, intermediate_size=8, embedding_size=8
    )
    with pytest.raises(UnsupportedModel, match="'albert'") as caught:
        describe(AutoModel.from_config(config))
    assert all(family in str(caught.value) for family in FAMILIES)


def test_other_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="BertForTokenClassification is neither"):
        describe(AutoModelForTokenClassification.from_config(config_of("bert")))
    with pytest.raises(UnsupportedModel, match="does text-embedding, not text-classification"):
        describe(tiny("bert", "text-embedding"), task="text-classification")
    with pytest.raises(UnsupportedModel, match="no task 'ner'"):
        describe(tiny("bert"), task="ner")
    with pytest.raises(UnsupportedModel, match="pooling 'max'"):
        describe(tiny("bert", "text-embedding"), pooling="max")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "is a decoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "is a decoder"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions"),
        ({"hidden_act": "gelu_fast"}, "activation is 'gelu_fast'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        describe(tiny("bert", **changes))


def test_layouts() -> None:
    heads = {family: describe(tiny(family)).layout.head for family in FAMILIES}
    assert heads["bert"] == ("bert.pooler", "classifier")
    assert heads["distilbert"] == ("pre_classifier", "relu", "classifier")
    assert {heads[family] for family in ("roberta", "xlm-roberta", "electra", "mpnet")} == {("classifier",)}
    assert describe(tiny("electra")).layout.embeddings == ("electra.embeddings", "electra.embeddings_project")
    assert describe(tiny("electra", embedding_size=24)).layout.embeddings == ("electra.embeddings",)
    assert describe(tiny("mpnet")).layout.position_bias == "mpnet.encoder"
    encoder = describe(tiny("mpnet", "text-embedding"), pooling="cls", normalize=True).layout
    assert (encoder.position_bias, encoder.unused, encoder.head) == ("encoder", ("pooler",), ())
    assert (encoder.pooling, encoder.normalize) == ("cls", True)
    # a classifier reads its first token whatever is asked, and its logits are not normalized
    classifier = describe(tiny("bert"), pooling="mean", normalize=True).layout
    assert (classifier.pooling, classifier.normalize, classifier.unused) == ("cls", False, ())


def test_widths_are_those_of_the_weights() -> None:
    anatomy = describe(tiny("distilbert", num_attention_heads=3))
    assert anatomy.layout.head_dim == 8
    assert [(g.name, g.kind, g.units, g.layer) for g in anatomy.groups[:3]] == [
        ("layers", "layer", 3, -1),
        ("layer.0.heads", "head", 3, 0),
        ("layer.0.neurons", "neuron", 20, 0),
    ]
    assert anatomy.group("layer.2.heads").slices[0].positions.tolist()[1] == list(range(8, 16))
