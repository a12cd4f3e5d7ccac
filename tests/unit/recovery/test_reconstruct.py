from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from paredown.anatomy import describe
from paredown.calibration import divergence
from paredown.encoder import Encoder, linear_of
from paredown.network import network
from paredown.recovery import reconstruct
from paredown.surgery import cut
from paredown.types import Anatomy, Plan
from tests.contracts.families import FAMILIES, batch, tiny

LENGTHS = tuple(range(1, 12)) * 6


def batches(model: PreTrainedModel, count: int = 8) -> list[dict[str, Any]]:
    every = [batch(model, lengths=LENGTHS, seed=seed) for seed in range(count)]
    return [{name: tensor.numpy() for name, tensor in one.items()} for one in every]


def refit(
    model: PreTrainedModel, anatomy: Anatomy, **keep: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, list[dict[str, Any]]]:
    """The cut model, the re-fitted one, and texts that neither has seen."""
    changes = {name.replace("_", "."): units for name, units in keep.items()}
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), **changes})
    small = cut(model, anatomy, plan)
    data = batches(model, 10)
    fitted = reconstruct.recover(small, teacher=model, anatomy=anatomy, plan=plan, batches=data[:8])
    return small, fitted, data[8:]


def output(model: nn.Module, anatomy: Anatomy, inputs: dict[str, Any]) -> torch.Tensor:
    encoder = Encoder(model, anatomy.layout)
    with torch.no_grad():
        return encoder(**{name: torch.from_numpy(inputs[name]) for name in encoder.input_names})


def gain(
    model: nn.Module, anatomy: Anatomy, small: nn.Module, fitted: nn.Module, unseen: list[dict[str, Any]]
) -> float:
    """How many times nearer to the dense model the re-fitted one is on unseen texts."""
    dense = Encoder(model, anatomy.layout)
    before, after = (divergence(Encoder(one, anatomy.layout), dense, unseen) for one in (small, fitted))
    return before / max(after, 1e-12)


@pytest.mark.parametrize("family", ("bert", "gpt2", "llama"))
def test_the_teacher_may_be_cut_itself(family: str) -> None:
    """As in the second of several rounds: sub-layers of the teacher are gone, with and without a bias left of them."""
    model = tiny(family, "text-classification" if family == "bert" else "causal-lm")
    anatomy = describe(model)
    first = Plan(anatomy.fingerprint, {**anatomy.identity(), "layer.0.heads": (), "layer.1.neurons": ()})
    teacher = cut(model, anatomy, first)
    here = describe(teacher)
    small, fitted, unseen = refit(teacher, here, layer_0_neurons=tuple(range(9)), layer_2_neurons=tuple(range(8)))
    dense = network(teacher, here.layout)
    before, after = (divergence(network(one, here.layout), dense, unseen) for one in (small, fitted))
    assert 0 < after < before


@pytest.mark.parametrize("pooling", ("cls", "mean"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_changes_nothing(family: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the re-fit is kept, which it otherwise is not: it brings a copy of the dense model no nearer."""
    verdicts = iter((1.0, 0.0))
    monkeypatch.setattr(reconstruct, "divergence", lambda *_: next(verdicts))
    model = tiny(family, "text-embedding")
    anatomy = describe(model, pooling=pooling)
    _, fitted, unseen = refit(model, anatomy)
    after, before = fitted.state_dict(), model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before), "nothing was solved"
    torch.testing.assert_close(output(fitted, anatomy, unseen[0]), output(model, anatomy, unseen[0]), rtol=0, atol=1e-4)


def plant_redundancy(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """The second half of every layer's neurons computes, scaled, what the first half does."""
    for block in model.get_submodule(anatomy.layout.layers).children():
        up, down = (linear_of(block, anatomy.layout, role) for role in ("up", "down"))
        with torch.no_grad():
            up.weight[10:], up.bias[10:] = up.weight[:10], up.bias[:10]
            down.weight[:, 10:] = torch.randn_like(down.weight[:, 10:])


@pytest.mark.parametrize("pooling", ("cls", "mean"))
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_redundancy_is_recovered(family: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly exactly, with half of all neurons gone. The ridge pulls back a little, so it is taken down here."""
    monkeypatch.setattr(reconstruct, "RIDGE", 1e-8)
    model = tiny(family, "text-embedding")
    anatomy = describe(model, pooling=pooling)
    plant_redundancy(model, anatomy)
    half = tuple(range(10))
    small, fitted, unseen = refit(model, anatomy, layer_0_neurons=half, layer_1_neurons=half, layer_2_neurons=half)
    wanted = output(model, anatomy, unseen[0])
    assert float((output(small, anatomy, unseen[0]) - wanted).abs().max()) > 0.1
    torch.testing.assert_close(output(fitted, anatomy, unseen[0]), wanted, rtol=0, atol=2e-3)


def test_the_usual_ridge_costs_little() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    plant_redundancy(model, anatomy)
    half = tuple(range(10))
    found = refit(model, anatomy, layer_0_neurons=half, layer_1_neurons=half, layer_2_neurons=half)
    assert gain(model, anatomy, *found) > 20


@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keep",
    [
        {"layer_0_heads": (0, 1, 3), "layer_1_heads": (0, 2, 3), "layer_1_neurons": tuple(range(15))},
        {"layer_0_heads": ()},
        {"layer_1_neurons": ()},
        {"layer_0_heads": (2,), "layer_0_neurons": (), "layer_2_heads": ()},
        {"layers": (0, 2)},
        {"layers": (0, 1)},
        {"layers": (2,), "layer_2_heads": (), "layer_2_neurons": (1, 5)},
    ],
    ids=("narrower", "no heads", "no neurons", "sub-layers gone", "middle layer gone", "top layer gone", "one layer"),
)
def test_cuts_are_brought_nearer(family: str, task: str, keep: dict[str, tuple[int, ...]]) -> None:
    model = tiny(family, task)
    anatomy = describe(model)
    small, fitted, unseen = refit(model, anatomy, **keep)
    top_gone = keep.get("layers") == (0, 1)  # then no layer is left to make up for it
    assert gain(model, anatomy, small, fitted, unseen) >= (1 - 1e-5 if top_gone else 1.05)
    projections = tuple(anatomy.layout.layer_names[role] for role in ("output", "down"))
    for name, tensor in fitted.state_dict().items():
        assert torch.isfinite(tensor).all()
        if not any(f".{projection}." in name for projection in projections):
            assert torch.equal(tensor, small.state_dict()[name]), f"{name} is not an output projection"


def test_one_projection_is_the_ridge_regression_towards_its_start() -> None:
    """Against the normal equations written out over the real rows."""
    linear = nn.Linear(5, 3)
    start = torch.cat([linear.weight.T, linear.bias[None]]).detach().double().numpy()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    x, residual, target = (torch.randn(2, 4, width) for width in (5, 3, 3))
    with torch.no_grad():
        reconstruct._refit(linear, lambda _: x, [target - residual], [mask], False)
    rows = mask.bool().numpy()
    z = np.concatenate([x.double().numpy()[rows], np.ones((4, 1))], axis=1)
    y = (target - residual).double().numpy()[rows]
    ridge = np.diag([*[reconstruct.RIDGE * np.square(z[:, :5]).sum(axis=0).mean()] * 5, 0])
    expected = np.linalg.solve(z.T @ z + ridge, z.T @ y + ridge @ start)
    found = torch.cat([linear.weight.T, linear.bias[None]]).detach().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("width", (0, 4))
def test_a_projection_without_bias(width: int) -> None:
    linear = nn.Linear(width, 3, bias=False) if width else nn.Linear(4, 3, bias=False)
    if not width:
        linear.weight = nn.Parameter(torch.zeros(3, 0))
    x = torch.randn(2, 6, width)
    target = x @ torch.ones(width, 3) + 5.0  # the constant is out of its reach
    with torch.no_grad():
        reconstruct._refit(linear, lambda _: x, [target], [torch.ones(2, 6)], False)
    assert linear.bias is None and linear.weight.isfinite().all()


def test_a_harmful_fit_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(linear: nn.Linear, *_: Any) -> None:
        linear.bias.fill_(50.0)

    monkeypatch.setattr(reconstruct, "_refit", spoil)
    model = tiny("bert")
    small, fitted, _ = refit(model, describe(model), layer_0_neurons=(1, 2, 3))
    after = fitted.state_dict()
    assert fitted is not small
    assert all(torch.equal(tensor, after[name]) for name, tensor in small.state_dict().items())


def test_every_layer_of_the_teacher_is_reported() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "layers": (1,)})
    told: list[int] = []
    small = cut(model, anatomy, plan)
    reconstruct.recover(
        small, teacher=model, anatomy=anatomy, plan=plan, batches=batches(model, 2), progress=told.append
    )
    assert told == [1, 1, 1]


@pytest.mark.parametrize(("count", "held"), [(1, [0]), (2, [1]), (3, [1]), (9, [4]), (10, [5]), (26, [5, 15, 25])])
def test_a_tenth_of_the_batches_judges(count: int, held: list[int]) -> None:
    assert list(reconstruct.held_out(count)) == held
