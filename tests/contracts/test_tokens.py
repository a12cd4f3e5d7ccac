"""What every scorer, every public file of tokens/, must pass under every policy: packed execution is what a slow,
masked reference computes text by text; special tokens stay, in order; a policy that drops nothing is the dense model.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paredown import registry
from paredown.encoder import Encoder
from paredown.tokens import Packed, Seen, applied
from paredown.types import TokenPolicy, TokenStage
from tests.contracts.policies import ENCODERS, RULES, SCORERS, SPECIAL, example, median_score, trained

# ---------------------------------------------------------------------------------------------- the slow reference


def reference(
    encoder: Encoder, policy: TokenPolicy, tensors: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[Tensor, list[list[list[int]]]]:
    """Every text alone and at full length: tokens that are gone are masked, nothing is packed. Answers [B, ...], and
    the positions that each text is left with after each stage.
    """
    answers, left = [], []
    for row in range(len(inputs["input_ids"])):
        n = int(inputs["attention_mask"][row].sum())
        one = {name: tensor[row : row + 1, :n] for name, tensor in inputs.items()}
        answer, positions = _alone(encoder, policy, tensors, one, n)
        answers.append(answer)
        left.append(positions)
    return torch.cat(answers), left


def _alone(
    encoder: Encoder, policy: TokenPolicy, tensors: dict[str, Tensor], one: dict[str, Tensor], n: int
) -> tuple[Tensor, list[list[int]]]:
    ids = one["input_ids"]
    x = encoder.embed(ids, one.get("token_type_ids"))
    alive, sizes = torch.ones(1, n), torch.ones(n)
    extra, left = torch.zeros(encoder.layout.width), []
    stages = {stage.after: stage for stage in policy.stages}
    for index, layer in enumerate(encoder.layers):
        mask = encoder.mask(x, alive)
        mask = mask + torch.where(alive[0] > 0, sizes.log(), torch.tensor(0.0))
        attention = layer.probabilities(x, mask)
        keys = layer.key(x).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        x = layer.feed(layer.attend(x, mask))
        stage = stages.get(index + 1)
        if stage is None:
            continue
        here = [i for i in range(n) if alive[0, i]]
        special = [i for i in here if int(ids[0, i]) in policy.special_ids]
        exempt = n <= max(policy.least, policy.off_below)
        if policy.action == "merge" and not exempt:
            _merge(x[0], keys[0].mean(0), sizes, alive[0], special, _number(policy, stage, np.arange(len(here)) * 1.0))
        elif not exempt:
            seen = Seen(
                stream=x,
                keys=keys,
                attention=attention,
                first_attention=attention[:, :, 0],
                ids=ids,
                positions=torch.arange(n)[None],
                gate=tensors[f"gate.{stage.after}"],
                real=alive.clone(),
            )
            scores = registry.find("tokens", policy.scorer).score(seen)[0]
            number = _number(policy, stage, scores[here].double().numpy(), special=[here.index(i) for i in special])
            best = sorted(here, key=lambda i: (i not in special, -float(scores[i]), i))
            for i in best[max(number, len(special)) :]:
                alive[0, i] = 0
                extra += x[0, i] @ tensors[f"exit.{stage.after}.weight"] + tensors[f"exit.{stage.after}.bias"]
        left.append([i for i in range(n) if alive[0, i]])
    if encoder.layout.pooling == "cls":
        pooled = x[:, 0]
    elif policy.action == "merge":
        pooled = (x * (sizes * alive[0])[None, :, None]).sum(1) / n
    elif policy.exit:
        pooled = ((x * alive[:, :, None]).sum(1) + extra) / n
    else:
        pooled = (x * alive[:, :, None]).sum(1) / alive.sum()
    return encoder.finish(pooled[:, None]), left


def _number(policy: TokenPolicy, stage: TokenStage, scores: np.ndarray, special: list[int] | None = None) -> int:
    """How many tokens stay: counted, where the package has a formula."""
    if policy.rule == "ratio":
        stay = math.ceil(round(stage.keep * len(scores), 9))
    elif policy.rule == "quantile":
        distinct = np.argsort(np.argsort(scores))  # of equal scores the package counts as if they differed
        stay = int((distinct >= np.quantile(distinct, stage.keep) - 1e-9).sum())
    else:
        always = np.isin(np.arange(len(scores)), special or [])
        stay = int(((scores >= stage.keep) | always).sum())
    return min(len(scores), max(policy.least, stay))


def _merge(x: Tensor, keys: Tensor, sizes: Tensor, alive: Tensor, special: list[int], stay: int) -> None:
    """ToMe in place, pair by pair."""
    here = [i for i in range(len(x)) if alive[i]]
    pairs = []
    for a in here[::2]:
        found = [(float(torch.cosine_similarity(keys[a], keys[b], dim=0)), b) for b in here[1::2] if b not in special]
        if a not in special and found:
            pairs.append((*max(found, key=lambda one: one[0]), a))
    pairs.sort(key=lambda one: -one[0])
    old, was = x.clone(), sizes.clone()
    for _, b, a in pairs[: len(here) - stay]:
        x[b] = x[b] * sizes[b] + old[a] * was[a]
        sizes[b] += was[a]
        x[b] /= sizes[b]
        alive[a] = 0


def agrees(encoder: Encoder, policy: TokenPolicy, inputs: dict[str, Tensor]) -> None:
    tensors = trained(encoder, policy)
    with torch.no_grad():
        found = Packed(encoder, policy, tensors)(**inputs)
        wanted, _ = reference(encoder, policy, tensors, inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "task"), ENCODERS)
def test_packed_is_the_slow_masked_reference(scorer: str, rule: str, family: str, task: str) -> None:
    encoder, inputs = example(family, task)
    policy = TokenPolicy(scorer, special_ids=SPECIAL, exit=encoder.layout.pooling == "mean", **RULES[rule])
    agrees(encoder, policy, inputs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("exit", [True, False])
def test_with_and_without_an_exit(rule: str, pooling: str, exit: bool) -> None:
    encoder, inputs = example("bert", "text-classification" if pooling == "cls" else "text-embedding")
    agrees(encoder, TokenPolicy("norm", special_ids=SPECIAL, exit=exit and pooling == "mean", **RULES[rule]), inputs)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("task", ["text-classification", "text-embedding"])
def test_a_threshold_leaves_every_text_its_own_number(scorer: str, task: str) -> None:
    encoder, inputs = example("bert", task)
    level = median_score(encoder, scorer, inputs)
    stages = (TokenStage(1, level), TokenStage(3, level))
    policy = TokenPolicy(scorer, stages, rule="threshold", special_ids=SPECIAL, exit=task == "text-embedding")
    agrees(encoder, policy, inputs)
    with torch.no_grad():
        _, left = reference(encoder, policy, trained(encoder, policy), inputs)
    assert len({len(one[0]) for one in left}) > 2, "the threshold is such that it tells texts apart"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "switched off"])
@pytest.mark.parametrize(("family", "task"), ENCODERS)
def test_merging_is_the_slow_masked_reference(rule: str, family: str, task: str) -> None:
    encoder, inputs = example(family, task)
    agrees(encoder, TokenPolicy("norm", action="merge", special_ids=SPECIAL, **RULES[rule]), inputs)


@pytest.mark.parametrize("scorer", SCORERS)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_at_any_length(scorer: str, data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(1, 512), min_size=1, max_size=4), label="lengths"))
    task = data.draw(st.sampled_from(["text-classification", "text-embedding"]), label="task")
    rule = data.draw(st.sampled_from(sorted(RULES)), label="rule")
    seed = data.draw(st.integers(0, 99), label="seed")
    encoder, inputs = example("bert", task, lengths, seed=seed, max_position_embeddings=512)
    agrees(encoder, TokenPolicy(scorer, special_ids=SPECIAL, exit=task == "text-embedding", **RULES[rule]), inputs)


@pytest.mark.parametrize("scorer", SCORERS)
def test_special_tokens_stay_and_order_is_kept(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, inputs = example("bert", "text-embedding")
    policy = TokenPolicy(scorer, (TokenStage(1, 0.3), TokenStage(2, 0.5)), special_ids=SPECIAL)
    tensors = trained(encoder, policy)
    seen = []
    packed = Packed(encoder, policy, tensors)
    mean = packed._mean
    monkeypatch.setattr(packed, "_mean", lambda texts: seen.append(texts) or mean(texts))
    with torch.no_grad():
        packed(**inputs)
        _, left = reference(encoder, policy, tensors, inputs)
    (texts,) = seen
    for group, tokens, rows in texts.spans():
        positions = texts.positions[tokens].unflatten(0, (group.texts, group.tokens))
        for row, found in zip(texts.rows[rows].tolist(), positions.tolist(), strict=True):
            assert found == left[row][-1]  # rising, as the reference lists them
            assert {0, int(inputs["attention_mask"][row].sum()) - 1} <= set(found)


@pytest.mark.parametrize(("family", "task"), ENCODERS)
def test_an_identity_policy_is_the_dense_model_bit_for_bit(family: str, task: str) -> None:
    encoder, inputs = example(family, task)
    for rule, keep in (("ratio", 1.0), ("quantile", 0.0)):
        policy = TokenPolicy("norm", (TokenStage(2, keep),), rule=rule, special_ids=SPECIAL)
        with torch.no_grad():
            assert torch.equal(applied(encoder, policy)(**inputs), encoder(**inputs))
            assert torch.equal(Packed(encoder, policy)(**inputs), Packed(encoder)(**inputs))


@pytest.mark.parametrize(("family", "task"), ENCODERS)
def test_unpadding_alone_changes_nothing(family: str, task: str) -> None:
    encoder, inputs = example(family, task)
    with torch.no_grad():
        torch.testing.assert_close(Packed(encoder)(**inputs), encoder(**inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
def test_padding_changes_no_score(scorer: str) -> None:
    """A scorer sees texts without padding when packed, and with it in an exported graph."""
    module, random = registry.find("tokens", scorer), torch.Generator().manual_seed(0)
    n, padded = 6, 9
    attention = torch.rand(2, 4, n, n, generator=random).softmax(-1)
    wide = torch.rand(2, 4, padded, padded, generator=random)
    wide[:, :, :, n:], wide[:, :, :n, :n] = 0.0, attention
    stream, keys = torch.randn(2, padded, 5, generator=random), torch.randn(2, 4, padded, 3, generator=random)
    ids, positions = torch.randint(5, 50, (2, padded), generator=random), torch.arange(padded).expand(2, -1)
    real = (torch.arange(padded) < n).float().expand(2, -1)
    gate = torch.randn(5, generator=random)
    short = Seen(stream[:, :n], keys[:, :, :n], attention, attention[:, :, 0], ids[:, :n], positions[:, :n], gate)
    long = Seen(stream, keys, wide, wide[:, :, 0], ids, positions, gate, real)
    torch.testing.assert_close(module.score(long)[:, :n], module.score(short))
