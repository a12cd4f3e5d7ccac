"""Scores brought to the scale of measured divergence."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from paredown.anatomy import describe
from paredown.calibration import collect, distance, divergence, tensors
from paredown.encoder import Encoder
from paredown.errors import BadData
from paredown.importance import score
from paredown.importance._measured import _scaled
from paredown.types import Anatomy, Array
from tests.contracts.families import FAMILIES, batch, tiny

LENGTHS = (11, 9, 8, 7, 6, 5)


def example(family: str, task: str) -> tuple[PreTrainedModel, Anatomy, list[dict[str, Any]], list[dict[str, Any]]]:
    model = tiny(family, task)
    calibration, judge = (
        [{name: one.numpy() for name, one in batch(model, lengths=LENGTHS, seed=seed).items()}] for seed in (1, 2)
    )
    return model, describe(model), calibration, judge


def without(model: PreTrainedModel, anatomy: Anatomy, name: str, calibration: list[dict[str, Any]]) -> PreTrainedModel:
    """The model whose sub-layer adds a constant: its mean output on the calibration texts."""
    layer, role = int(name.split(".")[1]), "output" if name.endswith("heads") else "down"
    gone = copy.deepcopy(model)
    linear = gone.get_submodule(f"{anatomy.layout.layers}.{layer}.{anatomy.layout.layer_names[role]}")
    found = collect(Encoder(model, anatomy.layout), anatomy, calibration, ["gram"])[name]
    assert found.gram is not None
    mean = torch.from_numpy(found.gram[-1, :-1] / found.rows).to(linear.weight.dtype)
    with torch.no_grad():
        linear.bias += linear.weight @ mean
        linear.weight.zero_()
    return gone


@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_adds_up_to_what_its_removal_changes(family: str, task: str) -> None:
    model, anatomy, calibration, judge = example(family, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    plain = score(model, anatomy, calibration, "magnitude")
    scaled = score(model, anatomy, calibration, "magnitude", judge=judge)
    for name, values in scaled.values.items():
        np.testing.assert_array_equal(np.argsort(values), np.argsort(plain.values[name]), err_msg=name)
        gone = without(model, anatomy, name, calibration)
        change = divergence(Encoder(gone, anatomy.layout), Encoder(model, anatomy.layout), judge)
        middle = len(values) // 2
        rising = np.sort(values)
        forced = rising[middle] <= rising[middle - 1] * (1 + 1e-9)  # scores that rise cannot add up to so little
        assert values.sum() == pytest.approx(change, rel=1e-3) or (forced and values.sum() > change), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_lower_half_adds_up_to_what_its_removal_changes() -> None:
    """The re-fit solved here by least squares over the rows themselves, and the answers by masking the weights."""
    model, anatomy, calibration, judge = example("bert", "text-embedding")
    name = "layer.2.neurons"
    found = score(model, anatomy, calibration, "magnitude", judge=judge).values[name]
    encoder = Encoder(copy.deepcopy(model), anatomy.layout)
    layer = encoder.layers[2]
    rows: list[torch.Tensor] = []
    handle = layer.down.register_forward_pre_hook(lambda _m, args: rows.append(args[0]))
    inputs = tensors(calibration[0], encoder)
    with torch.no_grad():
        encoder(**inputs)
        handle.remove()
        x = torch.cat([rows[0][inputs["attention_mask"].bool()], torch.ones(int(inputs["attention_mask"].sum()), 1)], 1)
        kept = np.append(np.sort(np.argsort(found)[len(found) // 2 :]), len(found))
        weight = torch.cat([layer.down.weight.T, layer.down.bias[None]])
        ridge = 1e-2 * float(x[:, kept[:-1]].square().sum(0).mean())
        damping = torch.diag(torch.tensor([ridge] * len(found) + [0.0]))
        gram = (x.T @ x + damping).double()
        layer.down.weight.zero_()
        solved = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.double()).float()
        layer.down.weight[:, kept[:-1]] = solved[:-1].T
        layer.down.bias.copy_(solved[-1])
        dense = Encoder(model, anatomy.layout)
        ours, wanted = (one(**tensors(judge[0], dense)) for one in (encoder, dense))
        change = float(distance(ours, wanted, "embeddings").mean())
    assert np.sort(found)[: len(found) // 2].sum() == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize(
    ("half", "whole", "expected"),
    (
        (6.0, 30.0, [2, 4, 6, 18]),  # the last unit takes what is left
        (6.0, 14.0, [2, 4, 4, 4]),  # no more in between than all of it, the rest evenly
        (6.0, 7.0, [2, 4, 4, 4]),  # scores rise: the half is kept to, the whole is not
        (0.0, 20.0, [2, 4, 6, 8]),  # the half changes nothing: the whole decides
        (0.0, 0.0, [0, 0, 0, 0]),
    ),
)
def test_scaling(half: float, whole: float, expected: list[float]) -> None:
    order = np.asarray([2, 0, 3, 1])
    scores: Array = np.empty(4)
    scores[order] = [1.0, 2.0, 3.0, 4.0]
    found = _scaled(scores, half, whole)
    np.testing.assert_allclose(found[order], expected, atol=1e-9)
    np.testing.assert_array_equal(np.argsort(found, kind="stable"), order)


def test_texts_are_needed() -> None:
    model, anatomy, _, judge = example("bert", "text-embedding")
    with pytest.raises(BadData, match="there are none"):
        score(model, anatomy, [], "magnitude", judge=judge)
