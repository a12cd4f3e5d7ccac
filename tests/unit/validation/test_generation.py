from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from paredown.anatomy import describe
from paredown.surgery import cut
from paredown.types import Plan
from paredown.validation.generation import Generation, compare, generate, measure
from tests.contracts.families import VOCABULARY, tiny

FINE = Generation(256, 0.05, 0, 0.4, 0.8, 0.9, 100.0)


def like(figures: Generation, **changes: Any) -> Generation:
    return dataclasses.replace(figures, **changes)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    drawn = np.random.default_rng(seed)
    return [drawn.integers(5, VOCABULARY, length).tolist() for length in lengths]


def lively(family: str, **changes: Any) -> PreTrainedModel:
    """A model that does not write the same token for ever; with another seed, or tied, the tiny GPT-2 does."""
    return tiny(family, "causal-lm", seed=1, tie_word_embeddings=False, **changes)


def precise(family: str) -> PreTrainedModel:
    """In float64 two ways of computing never disagree on the most likely token by rounding."""
    return lively(family).double()


def by_hand(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ------------------------------------------------------------------------------------------------------- measuring


def test_the_figures_of_texts_done_by_hand() -> None:
    # 4-grams: 1231 2312 3123 1231, of which one came before; 5 6 7 8 9 4 1: none of four.
    found = measure([[1, 2, 3, 1, 2, 3, 1], [5, 6, 7, 8, 9, 4, 1]], seconds=0.02)
    assert (found.tokens, found.longest_loop) == (7, 0)
    assert found.repeated_ngrams == pytest.approx((1 / 4 + 0) / 2)
    assert found.distinct_1 == pytest.approx(9 / 14)
    assert found.distinct_2 == pytest.approx((3 + 6) / 12)  # 12 23 31; the two texts are not joined
    assert found.distinct_3 == pytest.approx((3 + 5) / 10)
    assert found.tokens_per_second == pytest.approx(50)


def test_distinct_looks_across_texts_and_repetition_does_not() -> None:
    found = measure([[1, 2, 3, 4, 5]] * 2, seconds=1.0)
    assert found.repeated_ngrams == 0
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (0.5, 0.5, 0.5)


def test_the_length_is_the_rounded_mean() -> None:
    assert measure([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], seconds=1.0).tokens == 6


@pytest.mark.parametrize("text", [[], [7], [7, 7]])
def test_texts_too_short_for_any_figure(text: list[int]) -> None:
    found = measure([text], seconds=1.0)
    assert (found.repeated_ngrams, found.longest_loop, found.distinct_3) == (0, 0, 1)


def test_no_texts_have_no_figures() -> None:
    with pytest.raises(ValueError, match="no text"):
        measure([], seconds=1.0)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 31, 32])
@pytest.mark.parametrize("copies", [3, 4])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("place", ["start", "middle", "end", "all"])
def test_a_loop_is_found_in_its_whole_length(period: int, copies: int, more: int, place: str) -> None:
    more = min(more, period - 1)
    phrase = list(range(1, period + 1))
    loop = phrase * copies + phrase[:more]
    before = list(range(100, 120)) if place in ("middle", "end") else []
    after = list(range(200, 220)) if place in ("middle", "start") else []
    assert measure([[1000, 1001], before + loop + after], seconds=1.0).longest_loop == len(loop)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 32])
def test_a_phrase_said_not_quite_three_times_is_no_loop(period: int) -> None:
    phrase = list(range(1, period + 1))
    assert measure([[99, *phrase * 2, *phrase[:-1], 98]], seconds=1.0).longest_loop == 0


def test_a_phrase_of_more_than_32_tokens_is_no_loop_but_repetition() -> None:
    found = measure([list(range(33)) * 6], seconds=1.0)
    assert found.longest_loop == 0
    assert found.repeated_ngrams == pytest.approx(1 - 33 / (6 * 33 - 3))


def test_the_longest_of_several_loops_counts() -> None:
    assert measure([[1, 1, 1, 1, 50, *[2, 3] * 5, 2, 51, *[4, 5, 6] * 3]], seconds=1.0).longest_loop == 11
    assert measure([[1, 1, 1, 50, *[2] * 8, 51, *[3] * 4]], seconds=1.0).longest_loop == 8
    assert measure([[1] * 9, [2] * 14, [3] * 4], seconds=1.0).longest_loop == 14


def test_random_tokens_have_no_loop() -> None:
    texts = np.random.default_rng(0).integers(0, 32_000, (8, 4096)).tolist()
    found = measure(texts, seconds=1.0)
    assert (found.longest_loop, found.repeated_ngrams) == (0, 0)
    assert found.distinct_3 > 0.999


# ------------------------------------------------------------------------------------------------------- comparing


def test_a_model_as_good_as_the_dense_one_gives_no_warning() -> None:
    assert compare(FINE, FINE) == ()
    better = like(FINE, repeated_ngrams=0.0, distinct_1=0.5, distinct_2=0.9, distinct_3=1.0, tokens_per_second=1.0)
    assert compare(FINE, better) == ()
    assert compare(like(FINE, repeated_ngrams=0.9, longest_loop=250, distinct_2=0.1), FINE) == ()


@pytest.mark.parametrize(("repeated", "warns"), [(0.29, False), (0.31, True)])
def test_repeated_phrases_warn_when_they_rise_by_a_quarter_of_all(repeated: float, warns: bool) -> None:
    found = compare(FINE, like(FINE, repeated_ngrams=repeated))
    assert len(found) == warns
    if warns:
        assert "31% of its phrases of 4 tokens" in found[0] and "5% of the dense" in found[0]
    assert compare(like(FINE, repeated_ngrams=0.3), like(FINE, repeated_ngrams=repeated)) == ()


@pytest.mark.parametrize(
    ("dense", "pruned", "repeated", "warns"),
    [
        (0, 128, 0.2, True),
        (16, 256, 0.2, True),
        (0, 127, 0.2, False),  # not for half a text
        (17, 256, 0.2, False),  # the dense model loops as well
        (0, 256, 0.17, False),  # one text of eight
    ],
)
def test_a_loop_warns_where_the_dense_model_has_none(dense: int, pruned: int, repeated: float, warns: bool) -> None:
    found = compare(like(FINE, longest_loop=dense), like(FINE, longest_loop=pruned, repeated_ngrams=repeated))
    assert len(found) == warns
    if warns:
        assert f"{pruned} of 256 tokens" in found[0] and f"the dense model over {dense or 'none'}." in found[0]


@pytest.mark.parametrize(("name", "dense"), [("distinct_1", 0.4), ("distinct_2", 0.8), ("distinct_3", 0.9)])
@pytest.mark.parametrize(("ratio", "warns"), [(0.71, False), (0.69, True)])
def test_fewer_different_ngrams_warn(name: str, dense: float, ratio: float, warns: bool) -> None:
    found = compare(FINE, like(FINE, **{name: dense * ratio}))
    assert len(found) == warns
    if warns:
        what = {"1": " tokens", "2": "pairs", "3": "triples"}[name[-1]]
        assert "69% as many" in found[0] and what in found[0]


def test_a_model_that_only_loops_gets_every_warning() -> None:
    drawn = np.random.default_rng(0)
    dense = measure(drawn.integers(0, 400, (8, 256)).tolist(), seconds=1.0)
    pruned = measure([[*text[:20], *[1, 2, 3] * 78, 1, 2] for text in drawn.integers(0, 400, (8, 20)).tolist()], 1.0)
    assert compare(dense, dense) == ()
    found = compare(dense, pruned)
    assert [
        words in one for words, one in zip(("repeats itself", "gets stuck", "less that is new"), found, strict=True)
    ]
    assert all(one.endswith(".") and one[0].isupper() for one in found)


def test_texts_of_other_lengths_do_not_compare() -> None:
    with pytest.raises(ValueError, match="256 tokens and of 64"):
        compare(FINE, like(FINE, tokens=64))


# ------------------------------------------------------------------------------------------------------ generating


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_texts_are_those_of_a_greedy_loop_without_cache(family: str) -> None:
    model = precise(family)
    asked = prompts(1, 9, 5)
    texts, seconds = generate(model, asked, num_tokens=20)
    assert texts == [by_hand(model, prompt, 20) for prompt in asked]
    assert seconds > 0
    assert len({token for text in texts for token in text}) > 9


def test_a_pruned_model_generates_too() -> None:
    model = precise("llama")
    anatomy = describe(model)
    keep = {**anatomy.identity(), "layer.0.heads": (), "layer.1.neurons": (1, 5), "layers": (0, 1)}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    asked = prompts(4, 7)
    assert generate(small, asked, num_tokens=20)[0] == [by_hand(small, prompt, 20) for prompt in asked]


def test_end_of_text_neither_ends_a_text_nor_is_barred() -> None:
    model = precise("llama")
    prompt = prompts(6)[0]
    expected = by_hand(model, prompt, 20)
    model.generation_config.eos_token_id = expected[3]
    model.config.eos_token_id = expected[3]
    assert generate(model, [prompt], num_tokens=20)[0] == [expected]


def test_what_the_models_own_generation_config_asks_for_is_left_out() -> None:
    model = precise("llama")
    expected = generate(model, prompts(6), num_tokens=20)
    changes = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    model.generation_config.update(**changes, num_beams=3, min_length=30, max_length=31, suppress_tokens=[3, 4, 5, 6])
    before = model.generation_config.to_dict()
    assert generate(model, prompts(6), num_tokens=20)[0] == expected[0]
    assert model.generation_config.to_dict() == before


def test_nothing_else_changes() -> None:
    model = lively("gpt2", resid_pdrop=0.5).train()
    frozen = next(iter(model.transformer.h)).mlp.eval()  # one part is in another mode than the rest
    modes = {name: module.training for name, module in model.named_modules()}
    own, attributes = model.generation_config, set(vars(model))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = generate(model, prompts(4), num_tokens=10)[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert model.generation_config is own and set(vars(model)) == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes and not frozen.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert generate(model, prompts(4), num_tokens=10)[0] == first  # without the dropout of training
    assert generate(model.eval(), prompts(4), num_tokens=10)[0] == first


def test_the_mode_comes_back_after_an_error() -> None:
    model = tiny("llama", "causal-lm").train()
    with pytest.raises(IndexError):
        generate(model, [[VOCABULARY + 1]], num_tokens=3)
    assert all(module.training for module in model.modules())


def test_transformers_says_nothing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", "causal-lm")
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = 3
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        generate(model, prompts(4, 2), num_tokens=36)  # up to the last of 40 positions
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_too_long_loses_its_left(family: str) -> None:
    model = precise(family)
    long = prompts(60)[0]
    assert generate(model, [long], num_tokens=30)[0] == [by_hand(model, long[-10:], 30)]
    assert generate(model, [long[-10:]], num_tokens=30)[0] == [by_hand(model, long[-10:], 30)]
    assert generate(model, [long], num_tokens=39)[0] == [by_hand(model, long[-1:], 39)]


def test_what_does_not_fit_is_refused() -> None:
    model = tiny("gpt2", "causal-lm")
    with pytest.raises(ValueError, match="40 positions, which 40 new tokens and a prompt do not fit into.* at most 39"):
        generate(model, prompts(4), num_tokens=40)


@pytest.mark.parametrize(("asked", "num_tokens"), [([], 3), ([[5], []], 3), ([[5]], 0)])
def test_nothing_to_continue_is_refused(asked: list[list[int]], num_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(tiny("gpt2", "causal-lm"), asked, num_tokens=num_tokens)


def test_a_model_without_a_limit_takes_the_whole_prompt() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=4, initializer_range=0.3)
    model = BloomForCausalLM(config).double().eval()
    assert not hasattr(config, "max_position_embeddings")
    long = prompts(50)[0]
    assert generate(model, [long], num_tokens=5)[0] == [by_hand(model, long, 5)]


def test_progress_ends_at_one() -> None:
    shares: list[float] = []
    generate(tiny("gpt2", "causal-lm"), prompts(4, 2, 3, 1), num_tokens=3, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
