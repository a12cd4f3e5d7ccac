from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import BadData, ParityFailure, UnsupportedModel
from paredown.models import load_model
from paredown.surgery import cut, fold
from paredown.targets import huggingface
from paredown.targets.huggingface import export, expressible
from paredown.types import Anatomy, Plan
from tests.contracts.families import DECODERS, FAMILIES, batch, stock, tiny, tiny_tokenizer


def uniform(anatomy: Anatomy, layers: tuple[int, ...] = (0, 2), **keep: tuple[int, ...]) -> Plan:
    """Other neurons in every layer, as many in all of them."""
    neurons = {f"layer.{i}.neurons": (i, 5 + i, 9, 14 + i) for i in range(3)}
    changes = {name.replace("_", "."): units for name, units in keep.items()}
    return Plan(anatomy.fingerprint, {**anatomy.identity(), **neurons, "layers": layers, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_opens_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family, half of them as sentence encoders, reopened by the stock classes."""
    if family not in ("bert", "distilbert", "mpnet"):  # of each make one also in a process without Paredown: seconds
        monkeypatch.setattr(huggingface, "_verify", lambda *_: None)
    task = ("text-classification", "text-embedding")[FAMILIES.index(family) % 2]
    model = tiny(family, task)
    anatomy = describe(model, pooling="mean", normalize=True)
    plan = uniform(anatomy)
    small = cut(fold(model, anatomy)[0], anatomy, plan)
    config = small.config.to_dict()
    folder = export(small, tiny_tokenizer(family), tmp_path / "slim", anatomy=anatomy, plan=plan, max_length=11)
    assert folder == tmp_path / "slim" and [path.name for path in tmp_path.iterdir()] == ["slim"]
    assert small.config.to_dict() == config  # the caller's config is not touched
    saved = json.loads((folder / "config.json").read_text())
    assert saved["n_layers" if family == "distilbert" else "num_hidden_layers"] == 2
    assert saved["hidden_dim" if family == "distilbert" else "intermediate_size"] == 4
    assert not list(folder.rglob("*.bin"))
    loaded = load_model(folder)
    assert (loaded.task, loaded.normalize, loaded.max_length) == (task, task == "text-embedding", 11)
    inputs = batch(model)
    encoder = Encoder(small, anatomy.layout)
    with torch.no_grad():
        got = encoder(**{name: inputs[name] for name in encoder.input_names})
    assert torch.allclose(stock(loaded.model, inputs, normalize=True), got, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_stock_transformers_opens_a_decoder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reopened by AutoModelForCausalLM, the tied, the sliding and the fused also in a process without Paredown."""
    if family not in ("llama", "gemma3_text", "gpt2"):
        monkeypatch.setattr(huggingface, "_verify", lambda *_: None)
    model = tiny(family, "causal-lm", vocab_size=64)
    anatomy = describe(model)
    groups = {} if family == "gpt2" else {f"layer_{i}_heads": (i % 2,) for i in range(3)}
    plan = uniform(anatomy, **groups)
    small = cut(model, anatomy, plan)
    export(small, tiny_tokenizer(family), tmp_path / "slim", anatomy=anatomy, plan=plan, max_length=30)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32).eval()
    kinds = getattr(model.config, "layer_types", None)
    assert stock.config.num_hidden_layers == 2
    assert getattr(stock.config, "layer_types", None) == (kinds[::2] if kinds else kinds)
    if groups:
        assert (stock.config.num_key_value_heads, stock.config.num_attention_heads) == (1, 2)
    inputs = batch(model)
    with torch.no_grad():
        ours, theirs = small(**inputs).logits, stock(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-5)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = inputs["input_ids"][:1, :3]
    fast, slow = (stock.generate(ids, use_cache=cached, **how) for cached in (True, False))
    assert torch.equal(fast, slow) and fast.shape == (1, 9)


def test_gpt2_without_heads_is_not_for_stock() -> None:
    anatomy = describe(tiny("gpt2", "causal-lm"))
    plan = uniform(anatomy, **{f"layer_{i}_heads": (0, 1) for i in range(3)})
    assert "derives the size of a head" in str(expressible(anatomy, plan))


def test_what_the_config_cannot_express() -> None:
    anatomy = describe(tiny("bert"))
    assert expressible(anatomy, uniform(anatomy)) is None
    assert expressible(anatomy, Plan(anatomy.fingerprint, anatomy.identity())) is None
    for keep, words in (
        ({"layer_0_heads": (0, 1)}, "layer.0.heads keeps 2 of 4 heads"),
        ({"layer_0_heads": ()}, "layer.0.heads keeps 0 of 4 heads"),
        ({"layer_2_neurons": (0, 1)}, "2 to 4 neurons"),
        ({"layer_0_neurons": (), "layer_2_neurons": ()}, "no layer keeps any neuron"),
    ):
        reason = expressible(anatomy, uniform(anatomy, **keep))
        assert reason and words in reason
    gone = uniform(anatomy, layer_1_heads=(), layer_1_neurons=())
    assert expressible(anatomy, gone) is None  # layer 1 is not kept, so its widths do not count


def test_an_already_cut_model_is_judged_by_its_config() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    small = cut(model, anatomy, Plan(anatomy.fingerprint, {**anatomy.identity(), "layer.0.heads": (0, 1)}))
    again = describe(small)
    assert "2 of 4 heads" in str(expressible(again, Plan(again.fingerprint, again.identity())))


def test_export_refuses(tmp_path: Path) -> None:
    model = tiny("bert")
    anatomy = describe(model)
    plan = uniform(anatomy, layer_0_heads=(0,))
    with pytest.raises(UnsupportedModel, match="layer.0.heads"):
        export(
            cut(model, anatomy, plan), tiny_tokenizer("bert"), tmp_path / "a", anatomy=anatomy, plan=plan, max_length=11
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    plan = uniform(anatomy)
    with pytest.raises(BadData, match="not an empty folder"):
        export(
            cut(model, anatomy, plan),
            tiny_tokenizer("bert"),
            tmp_path / "full",
            anatomy=anatomy,
            plan=plan,
            max_length=11,
        )


def test_a_checkpoint_that_computes_something_else_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert")
    anatomy = describe(model)
    plan = uniform(anatomy)
    small = cut(model, anatomy, plan)
    save = huggingface._save

    def damage(model_: object, *others: Any) -> None:
        save(cut(tiny("bert", seed=1), anatomy, plan), *others)

    monkeypatch.setattr(huggingface, "_save", damage)
    with pytest.raises(ParityFailure, match="outputs differ by"):
        export(small, tiny_tokenizer("bert"), tmp_path / "slim", anatomy=anatomy, plan=plan, max_length=11)
    assert list(tmp_path.iterdir()) == []
