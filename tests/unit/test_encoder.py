from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from paredown.anatomy import describe
from paredown.encoder import ACTIVATIONS, Encoder
from tests.contracts.families import FAMILIES, batch, stock, tiny

# That it equals the stock forward pass in every family and task is a contract: tests/contracts/test_anatomy.py.


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model = tiny(family).double()
    encoder = Encoder(model, describe(model).layout)
    inputs = {name: tensor[2:3] for name, tensor in batch(model).items()}
    length = int(inputs["attention_mask"].sum())
    alone = {name: tensor[:, :length] for name, tensor in inputs.items()}
    with torch.no_grad():
        assert torch.allclose(encoder(**inputs), encoder(**alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (9, 9)])
def test_short_and_unpadded_batches(family: str, lengths: tuple[int, ...]) -> None:
    model = tiny(family).double()
    encoder = Encoder(model, describe(model).layout)
    inputs = batch(model, lengths=lengths)
    with torch.no_grad():
        assert torch.allclose(encoder(**inputs), stock(model, inputs), atol=1e-12, rtol=0)


def test_one_head_with_a_position_bias() -> None:
    model = tiny("mpnet", num_attention_heads=1).double()
    encoder = Encoder(model, describe(model).layout)
    inputs = batch(model)
    with torch.no_grad():
        assert torch.allclose(encoder(**inputs), stock(model, inputs), atol=1e-12, rtol=0)


def test_the_last_step_gives_the_first_row_alone_only_for_cls() -> None:
    for task, rows in (("text-classification", 1), ("text-embedding", 11)):
        model = tiny("bert", task)
        encoder = Encoder(model, describe(model).layout)
        inputs = batch(model)
        shapes = []
        with torch.no_grad():
            x = encoder.embed(inputs["input_ids"], inputs["token_type_ids"])
            for index in range(3):
                assert torch.equal(encoder.forward_from(index, x, inputs["attention_mask"]), encoder(**inputs))
                x = encoder.step(index, x, encoder.mask(x, inputs["attention_mask"]))
                shapes.append(tuple(x.shape))
        assert shapes == [(4, 11, 24)] * 2 + [(4, rows, 24)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_of_attention_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel; the graph written out for export; and what training in bfloat16 does, to its precision."""
    model = tiny(family)
    encoder = Encoder(model, describe(model).layout)
    inputs = batch(model)
    with torch.no_grad():
        fused = encoder(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(**inputs).float()
    torch.testing.assert_close(half, fused, rtol=0.05, atol=0.05)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with torch.no_grad():
        torch.testing.assert_close(encoder(**inputs), fused, rtol=1e-5, atol=1e-6)


def test_dropout_is_never_applied() -> None:
    model = tiny("bert", hidden_dropout_prob=0.5)
    encoder = Encoder(model, describe(model).layout)
    inputs = batch(model)
    with torch.no_grad():
        expected = encoder(**inputs)
        assert encoder.train() is encoder
        assert not encoder.training and not model.training
        assert torch.equal(encoder(**inputs), expected)


def test_pieces_make_up_the_layer() -> None:
    """`context` and `hidden` are the inputs of the two output projections, which recovery re-fits."""
    model = tiny("bert", "text-embedding").double()
    encoder = Encoder(model, describe(model).layout)
    inputs = batch(model)
    with torch.no_grad():
        x = encoder.embed(inputs["input_ids"], inputs["token_type_ids"])
        mask = encoder.mask(x, inputs["attention_mask"])
        layer = encoder.layers[0]
        module = model.get_submodule("encoder.layer.0")
        context = layer.context(x, mask)
        attention = module.attention.output.LayerNorm(x + module.attention.output.dense(context))
        assert torch.allclose(layer.attend(x, mask), attention, atol=1e-12)
        out = module.output.LayerNorm(attention + module.output.dense(layer.hidden(attention)))
        assert torch.allclose(layer.feed(attention), out, atol=1e-12)
        q, k, v = (getattr(module.attention.self, name)(x)[2, :3, :6] for name in ("query", "key", "value"))  # head 0
        expected = F.softmax(q @ k.T / math.sqrt(6), -1) @ v
        assert torch.allclose(context[2, :3, :6], expected, atol=1e-12)


def test_it_owns_no_weights() -> None:
    model = tiny("bert")
    encoder = Encoder(model, describe(model).layout)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    encoder(**batch(model)).sum().backward()
    assert model.get_submodule("bert.encoder.layer.0.output.dense").weight.grad is not None
    assert "(4, 20)" in repr(encoder)
