from __future__ import annotations

import copy

import pytest
import torch

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import FingerprintMismatch
from paredown.models import build_empty
from paredown.surgery import cut, mask, parameters
from paredown.types import Anatomy, Plan
from tests.contracts.families import FAMILIES, batch, stock, tiny, widths

# That a cut equals its mask, in every family, is a contract: tests/contracts/test_anatomy.py.


def plan_of(anatomy: Anatomy, **keep: tuple[int, ...]) -> Plan:
    changes = {name.replace("_", "."): units for name, units in keep.items()}
    return Plan(anatomy.fingerprint, {**anatomy.identity(), **changes})


def test_the_right_rows_and_columns_stay() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    small = cut(model, anatomy, plan_of(anatomy, layer_1_heads=(0, 2), layer_1_neurons=(3, 19), layers=(1, 2)))
    old, new = (m.get_submodule(f"bert.encoder.layer.{i}") for m, i in ((model, 1), (small, 0)))
    rows = [*range(6), *range(12, 18)]
    for name in ("query", "key", "value"):
        before, after = (layer.attention.self.get_submodule(name) for layer in (old, new))
        assert torch.equal(after.weight, before.weight[rows]) and torch.equal(after.bias, before.bias[rows])
    assert torch.equal(new.attention.output.dense.weight, old.attention.output.dense.weight[:, rows])
    assert torch.equal(new.attention.output.dense.bias, old.attention.output.dense.bias)
    assert torch.equal(new.intermediate.dense.weight, old.intermediate.dense.weight[[3, 19]])
    assert torch.equal(new.intermediate.dense.bias, old.intermediate.dense.bias[[3, 19]])
    assert torch.equal(new.output.dense.weight, old.output.dense.weight[:, [3, 19]])
    assert widths(small) == [(2, 2), (4, 20)]
    # 2 heads: 3 * (12 * 24 + 12) + 24 * 12 rows and columns; 18 neurons: 18 * (24 + 1 + 24); a layer: counted whole
    layer = sum(p.numel() for p in model.get_submodule("bert.encoder.layer.0").parameters())
    assert parameters(model) - parameters(small) == 3 * (12 * 24 + 12) + 24 * 12 + 18 * (24 + 1 + 24) + layer


def test_parameters_keep_what_they_are() -> None:
    model = tiny("bert")
    model.get_submodule("bert.encoder.layer.0.intermediate.dense").weight.requires_grad_(False)
    anatomy = describe(model)
    small = cut(model, anatomy, plan_of(anatomy, layer_0_neurons=(1, 2)))
    up = small.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert isinstance(up.weight, torch.nn.Parameter) and not up.weight.requires_grad and up.bias.requires_grad
    assert up.weight.is_contiguous() and small.get_submodule("bert.encoder.layer.0.output.dense").weight.is_contiguous()


def test_training_mode_follows() -> None:
    model = tiny("distilbert").train()
    anatomy = describe(model)
    small = cut(model, anatomy, plan_of(anatomy, layer_0_heads=(), layer_1_heads=(1,)))
    assert all(module.training for module in small.modules())
    assert not any(m.training for m in small.eval().modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_trains_and_is_copied(family: str) -> None:
    """Gradients reach every part that is left, also where a sub-layer or a bias per head is gone."""
    model = tiny(family)
    anatomy = describe(model)
    small = cut(
        model, anatomy, plan_of(anatomy, layer_0_heads=(), layer_1_heads=(3,), layer_1_neurons=(), layers=(0, 1))
    )
    inputs = batch(model)
    twin = copy.deepcopy(small)
    assert torch.equal(stock(twin, inputs), stock(small, inputs))
    small(**inputs).logits.square().sum().backward()
    output = anatomy.layout.layer_names["output"]
    headless = small.get_submodule(f"{anatomy.layout.layers}.0.{output}")
    assert headless.weight.shape == (24, 0) and headless.bias.grad.abs().sum() > 0
    assert all(p.grad is None for p in twin.parameters()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_meta_device(family: str) -> None:
    model = tiny(family)
    anatomy = describe(model)
    plan = plan_of(anatomy, layer_0_heads=(), layer_2_heads=(1, 3), layer_2_neurons=(5,), layers=(0, 2))
    small = cut(model, anatomy, plan)
    empty = build_empty(model.config.to_dict(), "text-classification")
    shell = cut(empty, describe(empty), plan)
    assert all(parameter.is_meta for parameter in shell.parameters())
    shell.load_state_dict(small.state_dict(), assign=True)
    inputs = batch(model)
    assert torch.equal(stock(shell, inputs), stock(small, inputs))


def test_a_masked_layer_is_not_read_as_a_whole_one() -> None:
    model = tiny("mpnet")
    anatomy = describe(model)
    masked = mask(model, anatomy, plan_of(anatomy, layers=(0, 2)))
    with pytest.raises(AttributeError):
        Encoder(masked, anatomy.layout)


def test_bad_plans() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    for keep, words in (
        ({"layers": ()}, "keeps 0 units of 'layers', which needs 1"),
        ({"layers": (0, 3)}, "up to 3 of 'layers', which has 3"),
        ({"layer_0_heads": (-1, 2)}, "layer.0.heads"),
        ({"layer_0_heads": (2, 1)}, "not sorted and distinct"),
        ({"layer_0_neurons": (4, 4)}, "not sorted and distinct"),
        ({"layer_7_heads": (0,)}, "'layer.7.heads', a group that the model does not have"),
    ):
        for function in (cut, mask):
            with pytest.raises(FingerprintMismatch, match=words):
                function(model, anatomy, plan_of(anatomy, **keep))
    lacking = {name: units for name, units in anatomy.identity().items() if name != "layer.1.heads"}
    with pytest.raises(FingerprintMismatch, match="does not say what is kept of 'layer.1.heads'"):
        cut(model, anatomy, Plan(anatomy.fingerprint, lacking))
    cut(model, anatomy, Plan(anatomy.fingerprint, {**lacking, "layers": (0, 2)}))  # its layer is gone


def test_what_does_not_belong_together() -> None:
    model, other = tiny("bert"), tiny("bert", num_hidden_layers=2)
    anatomy = describe(model)
    plan = Plan(anatomy.fingerprint, anatomy.identity())
    for function in (cut, mask):
        with pytest.raises(FingerprintMismatch, match="the model given is"):
            function(other, anatomy, plan)
        with pytest.raises(FingerprintMismatch, match="the plan is for"):
            function(other, describe(other), plan)
