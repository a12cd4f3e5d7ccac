"""What a policy learns from texts: gates that know which tokens matter, and where dropped tokens would have gone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from paredown import registry
from paredown.anatomy import describe
from paredown.calibration import Batch, distance
from paredown.encoder import Encoder
from paredown.errors import BadData, UnsupportedModel
from paredown.tokens import Packed, Seen, applied, count, fit
from paredown.types import Array, TokenPolicy, TokenStage
from tests.contracts.families import TASKS, batch, tiny

CLASSIFIER, EMBEDDER = TASKS
LEARNED = TokenPolicy("learned", (TokenStage(1, 0.5),))
EXIT = TokenPolicy("norm", (TokenStage(2, 0.5),), exit=True)
LENGTHS = (12, 11, 10, 9, 8, 7, 6, 5)


def encoder_of(task: str = EMBEDDER, family: str = "bert", **changes: int) -> Encoder:
    model = tiny(family, task, num_hidden_layers=4, **changes)
    return Encoder(model, describe(model, pooling="cls" if task == CLASSIFIER else "mean").layout)


@cache
def texts(number: int, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> tuple[dict[str, Tensor], ...]:
    """So many batches of ragged random texts."""
    model = tiny("bert")
    return tuple(batch(model, lengths=lengths, seed=100 * seed + i) for i in range(number))


def arrays(batches: tuple[dict[str, Tensor], ...]) -> list[Batch]:
    return [{name: tensor.numpy() for name, tensor in one.items()} for one in batches]


# ----------------------------------------------------------------------------------------------------------- the gates


def removal(encoder: Encoder, after: int, one: dict[str, Tensor]) -> tuple[Tensor, Array]:
    """Of one text [1, n]: the stream behind a layer [1, n, D], and by how much the answer changes without each of its
    tokens but the first, from that layer on [n - 1].
    """
    n = one["input_ids"].shape[1]
    x = encoder.embed(one["input_ids"], one["token_type_ids"])
    whole = encoder.mask(x, torch.ones(1, n))
    for index in range(after):
        x = encoder.step(index, x, whole)
    there = torch.cat([torch.ones(1, n), 1 - torch.eye(n)])  # the dense model, and one row for every token without it
    state = x.expand(n + 1, -1, -1)
    mask = encoder.mask(state, there)
    for index in range(after, len(encoder.layers)):
        state = encoder.step(index, state, mask)
    first = encoder.layout.pooling == "cls"
    pooled = state[:, 0] if first else (state * there[:, :, None]).sum(1) / there.sum(1, keepdim=True)
    answers = encoder.finish(pooled[:, None])
    changes = distance(answers[1:], answers[:1].expand(n, -1), encoder.output_name)
    return x, changes[1:].double().numpy()


def found_by(encoder: Encoder, policy: TokenPolicy, tensors: dict[str, Tensor]) -> float:
    """Of what the third of the tokens changes that matters most, the share that the scorer's best third changes: mean
    over held-out texts.
    """
    after, scorer, shares = policy.stages[0].after, registry.find("tokens", policy.scorer), []
    for held_out in texts(3, seed=9, lengths=(13,) * 8):
        for row in range(8):
            one = {name: tensor[row : row + 1] for name, tensor in held_out.items()}
            with torch.no_grad():
                x, changes = removal(encoder, after, one)
                seen = Seen(
                    x, ids=one["input_ids"], positions=torch.arange(13)[None], gate=tensors.get(f"gate.{after}")
                )
                scores = scorer.score(seen)[0, 1:].numpy()
            shares.append(changes[np.argsort(-scores)[:4]].sum() / np.sort(changes)[-4:].sum())
    return float(np.mean(shares))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("after", [1, 2])
def test_the_gate_finds_the_tokens_whose_removal_changes_the_answer(task: str, after: int) -> None:
    encoder, policy = encoder_of(task), replace(LEARNED, stages=(TokenStage(after, 0.5),))
    learned = found_by(encoder, policy, fit(encoder, policy, arrays(texts(30))))
    assert learned > found_by(encoder, replace(policy, scorer="random"), {}) + 0.1


def test_there_is_one_gate_per_stage_and_the_model_is_left_alone() -> None:
    encoder, told = encoder_of(), []
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    policy = replace(LEARNED, stages=(TokenStage(1, 0.8), TokenStage(3, 0.5)), exit=True)
    found = fit(encoder, policy, arrays(texts(3)), progress=told.append)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        **{"gate.1": [24], "exit.1.weight": [24, 24], "exit.1.bias": [24]},
        **{"gate.3": [24], "exit.3.weight": [24, 24], "exit.3.bias": [24]},
    }
    for tensor in found.values():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and torch.isfinite(tensor).all()
        assert not tensor.requires_grad and tensor.abs().max() > 0
    assert told == [len(LENGTHS)] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    assert applied(encoder, policy, found)(**texts(1)[0]).shape == (len(LENGTHS), 24)


def test_a_gate_is_that_of_its_seed_however_texts_are_batched() -> None:
    encoder, batches = encoder_of(), arrays(texts(4))
    gate = fit(encoder, LEARNED, batches)["gate.1"]
    torch.manual_seed(5)  # nothing is drawn but from the seed that is given
    assert torch.equal(fit(encoder, LEARNED, batches, seed=0)["gate.1"], gate)
    assert not torch.allclose(fit(encoder, LEARNED, batches, seed=1)["gate.1"], gate, rtol=0.01)


def test_padding_teaches_nothing() -> None:
    encoder, batches = encoder_of(), arrays(texts(2))
    wide = [
        {name: np.pad(array, ((0, 0), (0, 7)), constant_values=0) for name, array in one.items()} for one in batches
    ]
    policy = replace(LEARNED, exit=True)
    narrow, padded = fit(encoder, policy, batches), fit(encoder, policy, wide)
    for name, tensor in narrow.items():
        torch.testing.assert_close(padded[name], tensor, atol=2e-3 * float(tensor.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("policy", [LEARNED, EXIT, replace(LEARNED, exit=True)])
def test_without_texts_there_is_nothing_to_learn_from(policy: TokenPolicy) -> None:
    with pytest.raises(BadData, match="fitted to texts, and there are none"):
        fit(encoder_of(), policy, [])


def test_most_policies_learn_nothing_and_need_no_texts() -> None:
    encoder = encoder_of()
    assert fit(encoder, TokenPolicy("norm", (TokenStage(1, 0.5),)), []) == {}
    assert fit(encoder, TokenPolicy("learned", exit=True), []) == {}  # no stage


def test_merging_asks_no_gate() -> None:
    encoder, policy = encoder_of(), replace(LEARNED, action="merge")
    assert fit(encoder, policy, []) == {}
    with torch.no_grad():
        wanted = applied(encoder, replace(policy, scorer="norm"))(**texts(1)[0])
        assert torch.equal(applied(encoder, policy, {})(**texts(1)[0]), wanted)


def test_a_policy_of_another_model_is_refused_in_one_sentence() -> None:
    encoder, policy = encoder_of(), replace(LEARNED, exit=True)
    tensors = fit(encoder_of(hidden_size=16), policy, arrays(texts(1)))
    right = fit(encoder, policy, arrays(texts(1)))
    for name, shapes in {
        "gate.1": r"\[16\], not \[24\]",
        "exit.1.weight": r"\[16, 16\], not \[24, 24\]",
        "exit.1.bias": r"\[16\], not \[24\]",
    }.items():
        with pytest.raises(UnsupportedModel, match=rf"fitted to another model: {name} is {shapes}") as caught:
            Packed(encoder, policy, {**right, name: tensors[name]})
        assert "\n" not in str(caught.value)
        with pytest.raises(UnsupportedModel, match=f"lacks its tensor {name}: fit it first"):
            Packed(encoder, policy, {key: tensor for key, tensor in right.items() if key != name})
    with pytest.raises(UnsupportedModel, match="after layer 4: the model has 4 layers"):
        Packed(encoder, replace(LEARNED, stages=(TokenStage(4, 0.5),)), {"gate.4": right["gate.1"]})
    with pytest.raises(UnsupportedModel, match="this one pools by cls"):
        Packed(encoder_of(CLASSIFIER), policy, right)


# ------------------------------------------------------------------------------------------------------------ the exit


def errors(encoder: Encoder, policy: TokenPolicy, tensors: dict[str, Tensor], number: int) -> tuple[float, float]:
    """The squared error of the mean over tokens, with the exit and without."""
    found = [0.0, 0.0]
    with torch.no_grad():
        for one in texts(number):
            wanted = encoder(**one)
            for i, each in enumerate((policy, replace(policy, exit=False))):
                found[i] += float((Packed(encoder, each, tensors)(**one) - wanted).square().sum())
    return found[0], found[1]


def test_the_exit_restores_the_mean_where_the_later_layers_are_linear() -> None:
    """Behind the stage they add nothing and only scale: where a token ends is linear in where it was."""
    encoder = encoder_of()
    names = encoder.layout.layer_names
    with torch.no_grad():
        for index in range(4):
            layer = encoder.model.get_submodule(f"{encoder.layout.layers}.{index}")
            for norm in (names["attention_norm"], names["ffn_norm"]):
                layer.get_submodule(norm).weight.fill_(1.0)
                layer.get_submodule(norm).bias.zero_()
            for part in (names["output"], names["down"]) if index >= EXIT.stages[0].after else ():
                layer.get_submodule(part).weight.zero_()
                layer.get_submodule(part).bias.zero_()
        random = torch.Generator().manual_seed(3)
        last = layer.get_submodule(names["ffn_norm"])
        last.weight.copy_(torch.rand(24, generator=random) + 0.5)
        last.bias.copy_(torch.randn(24, generator=random))
    tensors = fit(encoder, EXIT, arrays(texts(20)))
    with_exit, without = errors(encoder, EXIT, tensors, 3)
    assert with_exit < 1e-3 * without


@pytest.mark.parametrize("scorer", ["norm", "last", "learned"])
@pytest.mark.parametrize("stages", [(TokenStage(1, 0.5),), (TokenStage(1, 0.7), TokenStage(3, 0.6))])
def test_the_exit_is_nearer_to_the_dense_mean(scorer: str, stages: tuple[TokenStage, ...]) -> None:
    encoder, policy = encoder_of(), replace(EXIT, scorer=scorer, stages=stages)
    with_exit, without = errors(encoder, policy, fit(encoder, policy, arrays(texts(12))), 12)
    assert with_exit < 0.7 * without


def test_texts_that_lose_no_token_cannot_fit_an_exit() -> None:
    short = arrays(texts(2, lengths=(6, 5, 3)))
    for policy in (replace(EXIT, off_below=6), replace(EXIT, least=6), replace(EXIT, stages=(TokenStage(2, 0.95),))):
        with pytest.raises(BadData, match="none of the texts is so long that it loses a token"):
            fit(encoder_of(), policy, short)
    later = replace(EXIT, stages=(TokenStage(1, 0.6), TokenStage(2, 1.0)))  # at the second stage all stay
    with pytest.raises(BadData, match="none of the texts"):
        fit(encoder_of(), later, short)


# ------------------------------------------------------------------------------------------------------- how many stay


@pytest.mark.parametrize(
    ("rule", "keep", "tokens", "stay"),
    [
        ("ratio", 0.5, 9, 5),
        ("ratio", 0.55, 20, 11),  # 0.55 * 20 is a little above 11 in floating point
        ("ratio", 0.07, 100, 7),  # and this above 7
        ("ratio", 0.0, 9, 2),
        ("ratio", 0.1, 9, 2),
        ("ratio", 1.0, 9, 9),
        ("ratio", 0.1, 1, 1),  # least is more than there are
        ("quantile", 0.0, 9, 9),
        ("quantile", 0.5, 9, 5),
        ("quantile", 0.5, 10, 5),
        ("quantile", 0.07, 101, 94),
        ("quantile", 1.0, 9, 2),
        ("quantile", 0.3, 1, 1),
    ],
)
def test_how_many_tokens_stay(rule: str, keep: float, tokens: int, stay: int) -> None:
    stage = TokenStage(1, keep)
    policy = TokenPolicy("norm", (stage,), rule, least=2)
    assert count(policy, stage, tokens) == stay == Packed(encoder_of(), policy).count(stage, tokens)


def test_a_quantile_leaves_those_at_or_above_it() -> None:
    for tokens in range(1, 40):
        for keep in np.linspace(0, 1, 11):
            stage, scores = TokenStage(1, float(keep)), np.arange(tokens)
            wanted = max(1, int((scores >= np.quantile(scores, keep) - 1e-9).sum()))
            assert count(TokenPolicy("norm", (stage,), "quantile"), stage, tokens) == wanted
