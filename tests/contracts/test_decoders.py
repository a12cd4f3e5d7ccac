"""What every decoder must do after any cut: generate, with its cache as without it, and stay tied.

Models are float64 here, so that the two ways of computing never disagree on the most likely token by rounding.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from paredown.anatomy import describe
from paredown.surgery import cut, parameters
from paredown.types import Anatomy, Plan
from tests.contracts.families import DECODERS, batch, tiny
from tests.contracts.test_anatomy import precise

EVERY = pytest.mark.parametrize("family", DECODERS)


def uneven(anatomy: Anatomy) -> dict[str, Plan]:
    """Other widths in every layer; the first layer without attention; layers gone; query heads gone from groups."""
    whole = anatomy.identity()
    heads = {**whole, "layer.0.heads": whole["layer.0.heads"][:1], "layer.2.neurons": (1, 5, 6)}
    queries = {name: units[-1:] for name, units in whole.items() if name in ("layer.0.queries", "layer.2.queries")}
    keeps = {
        "widths": heads,
        "first layer without attention": {**whole, "layer.0.heads": (), "layer.1.neurons": ()},
        "first layer gone": {**whole, "layers": (1, 2), "layer.2.heads": whole["layer.2.heads"][1:]},
        "middle layer gone": {**whole, "layers": (0, 2)},
        "queries": {**heads, **queries},
    }
    return {name: Plan(anatomy.fingerprint, keep) for name, keep in keeps.items()}


def generated(model: PreTrainedModel, *, use_cache: bool, count: int = 12) -> torch.Tensor:
    ids = batch(model, lengths=(7, 7), seed=3)["input_ids"]
    return model.generate(  # type: ignore[no-any-return, operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=use_cache,
    )


@EVERY
def test_cached_generation_is_uncached_generation(family: str) -> None:
    model = precise(tiny(family, "causal-lm"))
    anatomy = describe(model)
    dense = generated(model, use_cache=False)
    for name, plan in uneven(anatomy).items():
        small = cut(model, anatomy, plan)
        slow = generated(small, use_cache=False)
        assert torch.equal(generated(small, use_cache=True), slow), name
        assert slow.shape == dense.shape


@EVERY
def test_tied_weights_stay_tied(family: str) -> None:
    model = tiny(family, "causal-lm", tie_word_embeddings=True)
    anatomy = describe(model)
    for plan in uneven(anatomy).values():
        small = cut(model, anatomy, plan)
        table, head = small.get_input_embeddings().weight, small.get_output_embeddings().weight
        assert table is head
        assert parameters(small) < parameters(model)


@EVERY
def test_the_config_follows(family: str) -> None:
    model = tiny(family, "causal-lm")
    anatomy = describe(model)
    small = cut(model, anatomy, uneven(anatomy)["first layer gone"])
    assert small.config.num_hidden_layers == 2
    kinds = getattr(model.config, "layer_types", None)
    assert getattr(small.config, "layer_types", None) == (kinds[1:] if kinds else kinds)
    assert model.config.num_hidden_layers == 3
    indices = [m.layer_idx for m in small.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert sorted(set(indices)) == [0, 1]
