"""What policies learn: gates that find the tokens that count, exits that bring back what went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paredown.encoder import Encoder
from paredown.errors import BadData, UnsupportedModel
from paredown.tokens import Packed, count, fit
from paredown.types import TokenPolicy, TokenStage
from tests.contracts.policies import SPECIAL, example, trained

GATED = TokenPolicy("learned", (TokenStage(1, 0.6), TokenStage(2, 0.5)), special_ids=SPECIAL)
Batch = dict[str, Any]


@pytest.fixture(scope="module", params=["text-embedding", "text-classification"])
def scene(request: pytest.FixtureRequest) -> tuple[Encoder, list[Batch]]:
    """An encoder and forty batches of texts for it."""
    encoder, inputs = example("bert", request.param, (24, 22, 20, 18), seed=1)
    batches = [inputs, *(example("bert", request.param, (24, 22, 20, 18), seed=seed)[1] for seed in range(2, 41))]
    return encoder, [{name: tensor.numpy() for name, tensor in one.items()} for one in batches]


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def test_a_gate_for_every_stage_alike_for_a_seed(scene: tuple[Encoder, list[Batch]]) -> None:
    encoder, batches = scene
    ours, again, other = (fit(encoder, GATED, batches[:4], seed=seed) for seed in (0, 0, 1))
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
        f"gate.{after}": [encoder.layout.width] for after in (1, 2)
    }
    assert all(torch.equal(ours[name], again[name]) and not torch.equal(ours[name], other[name]) for name in ours)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in ours.values())
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in encoder.model.parameters())


@pytest.mark.parametrize(
    "scene", ["text-classification"], indirect=True
)  # in a mean of random vectors, all count alike
def test_it_keeps_nearer_to_the_dense_answers_than_chance(scene: tuple[Encoder, list[Batch]]) -> None:
    encoder, batches = scene
    stages = (TokenStage(1, 0.5),)
    gates = fit(encoder, TokenPolicy("learned", stages, special_ids=SPECIAL), batches[:30])
    lost: dict[str, float] = {}
    with torch.no_grad():
        for scorer in ("learned", "random"):
            packed = Packed(encoder, TokenPolicy(scorer, stages, special_ids=SPECIAL), gates)
            lost[scorer] = sum(
                float((packed(**tensors(one)) - encoder(**tensors(one))).square().sum()) for one in batches[30:]
            )
    assert lost["learned"] < 0.8 * lost["random"]


def test_an_exit_brings_the_sum_nearer_to_that_of_all_tokens() -> None:
    encoder, inputs = example("bert", "text-embedding", (24, 22, 20, 18), seed=1)
    batches = [{name: tensor.numpy() for name, tensor in inputs.items()}]
    batches += [
        {name: tensor.numpy() for name, tensor in example("bert", "text-embedding", (24, 20), seed=seed)[1].items()}
        for seed in range(2, 12)
    ]
    plain = TokenPolicy("last", (TokenStage(3, 0.4),), special_ids=SPECIAL)  # one layer is left: nearly linear
    leaving = TokenPolicy("last", plain.stages, special_ids=SPECIAL, exit=True)
    learnt = fit(encoder, leaving, batches)
    width = encoder.layout.width
    assert [list(learnt[f"exit.3.{part}"].shape) for part in ("weight", "bias")] == [[width, width], [width]]
    with torch.no_grad():
        wanted = encoder(**inputs)
        lost = [float((Packed(encoder, one, learnt)(**inputs) - wanted).square().sum()) for one in (plain, leaving)]
    assert lost[1] < 0.7 * lost[0]


def test_texts_are_needed_where_something_is_learnt() -> None:
    encoder, inputs = example("bert", "text-embedding")
    with pytest.raises(BadData, match="there are none"):
        fit(encoder, GATED, [])
    assert fit(encoder, TokenPolicy("norm", GATED.stages), []) == {}
    short = [{name: tensor[:, :3].numpy() for name, tensor in inputs.items()}]
    with pytest.raises(BadData, match="none of the texts is so long"):
        fit(encoder, TokenPolicy("norm", (TokenStage(1, 0.5),), least=50, exit=True), short)


def test_what_was_learnt_on_another_model_is_refused() -> None:
    encoder, _ = example("bert", "text-embedding")
    learnt = {name: torch.ones(7) for name in trained(encoder, GATED)}
    with pytest.raises(UnsupportedModel, match=r"fitted to another model: gate.1 is \[7\]"):
        Packed(encoder, GATED, learnt)


@pytest.mark.parametrize(
    ("rule", "keep", "least", "tokens", "left"),
    [
        ("ratio", 0.5, 1, 10, 5),
        ("ratio", 0.5, 1, 11, 6),
        ("ratio", 0.3, 1, 10, 3),  # and not 4, for 0.3 * 10 = 3.0000000000000004
        ("ratio", 0.1, 4, 10, 4),
        ("ratio", 0.1, 40, 10, 10),
        ("quantile", 0.8, 15, 100, 20),
        ("quantile", 0.8, 30, 100, 30),
        ("quantile", 0.0, 1, 10, 10),
    ],
)
def test_how_many_stay(rule: str, keep: float, least: int, tokens: int, left: int) -> None:
    policy = TokenPolicy("norm", (TokenStage(1, keep),), rule=rule, least=least)
    assert count(policy, policy.stages[0], tokens) == left


def test_policies_as_text() -> None:
    policy = TokenPolicy("attention", (TokenStage(2, 0.8),), rule="quantile", least=15, off_below=20, special_ids=(1,))
    assert TokenPolicy.from_json(policy.to_json()) == policy and len(policy.id) == 64
    other = TokenPolicy("attention", (TokenStage(2, 0.7),), rule="quantile", least=15, off_below=20, special_ids=(1,))
    assert other.id != policy.id and not policy.is_identity
    assert TokenPolicy("norm").is_identity and TokenPolicy("norm", (TokenStage(1, 1.0),)).is_identity
    assert TokenPolicy("norm", (TokenStage(1, 0.0),), rule="quantile").is_identity
    with pytest.raises(ValueError, match="version 7"):
        TokenPolicy.from_json(policy.to_json().replace('"version":1', '"version":7'))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"rule": "whim"}, "choose ratio, quantile, threshold"),
        ({"action": "hide"}, "choose drop, merge"),
        ({"action": "merge", "rule": "threshold"}, "merging takes a ratio"),
        ({"action": "merge", "exit": True}, "no exit"),
        ({"stages": (TokenStage(0, 0.5),)}, "each is 1 or more"),
        ({"stages": (TokenStage(2, 0.5), TokenStage(1, 0.5))}, "they rise"),
        ({"stages": (TokenStage(1, 1.5),)}, "from 0 to 1"),
        ({"least": 0}, "least is 1 or more"),
        ({"off_below": -1}, "off_below 0 or more"),
    ],
)
def test_policies_that_make_no_sense(about: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenPolicy("norm", **about)
