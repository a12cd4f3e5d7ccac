"""Whether a pruned language model still writes like the dense one: a fine perplexity does not rule out endless loops.

Legend: L tokens of one text, P tokens of the phrase that a loop repeats.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

NGRAM = 4  # tokens: n of the seq-rep-n that Welleck et al. 2020 report
LONGEST_PHRASE = 32  # tokens: a long sentence; what comes back after more counts in `repeated_ngrams`
FEWEST_COPIES = 3  # people write "very, very" too; three in a row are rare and the least that shows a loop

# What chance does was tried on a tiny model that loops now and then by itself (its share of repeated 4-grams is 0.30).
# Against itself with other prompts it gets a warning in 7 of 100 pairs of 8 prompts, in 1 of 100 pairs of 16; pruned
# until it loops (a share above 0.65), in more than 90 of 100.
REPEATED_RISE = 0.25  # of the share of repeated 4-grams: two texts of eight that turn into nothing but a loop
DISTINCT_RATIO = 0.7  # of pruned to dense: other prompts alone give less than that in 2 of 100 pairs of 8 prompts
# The longest loop is an extreme: one text makes it. It warns where the dense model does not loop, the pruned one does
# for half a text, and the mean moves too, by more than one text of eight can move it. Two of eight texts that loop for
# at least half their length are then noticed in 96 of 100 cases, and one of eight in 5.
LOOP_SHARE = 1 / 2
NO_LOOP_SHARE = 1 / 16
LOOP_RISE = 1 / 8


@dataclass(frozen=True)
class Generation:
    """Figures of the texts that one model wrote.

    `tokens` is how many a text has: the mean, rounded.
    `repeated_ngrams` is the share of 4-grams that occurred before in the same text, the mean over texts: seq-rep-4 of
    Welleck et al. 2020 (arXiv:1908.04319). 0 for texts in which none does.
    `longest_loop` is the longest stretch, in any text, in which one phrase of up to 32 tokens stands back to back at
    least three times, in tokens; a last copy that breaks off counts as far as it goes. 0 where there is none.
    `distinct_1`, `distinct_2`, `distinct_3` are the different n-grams over all n-grams, of all texts together (Li et
    al. 2016, arXiv:1510.03055). They fall with the number and the length of texts: only those of equal ones compare.
    `tokens_per_second` is the speed of writing one text at a time with the cache, the reading of its prompt included.
    """

    tokens: int
    repeated_ngrams: float
    longest_loop: int
    distinct_1: float
    distinct_2: float
    distinct_3: float
    tokens_per_second: float


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int = 256,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[list[int]], float]:
    """The greedy continuation of every prompt, `num_tokens` new tokens each, and the seconds per token.

    The most likely token is taken always: what the model's own generation config asks for (sampling, a penalty on
    repetition, which would hide loops) is left out. The end-of-text token is one like any other, as with "ignore eos"
    elsewhere: the model may write it, and goes on with its next text. Texts then have one length and compare. Barring
    it instead drives a model that has finished into loops, the dense one too, and so hides what pruning adds: with its
    separator barred, the tiny model of the constants above repeated 0.54 of its 4-grams, and 0.30 without.

    A prompt that is too long for the model's positions loses tokens on its left. The seconds are the median over
    prompts, so that a slow first one is no matter; for speeds to rely on use `timing`. `progress` gets the share that
    is done, after every prompt. Raises ValueError when there is nothing to continue or no room for `num_tokens`.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts) or num_tokens < 1:
        raise ValueError("to generate takes at least one prompt, one token in every prompt, and one token to write")
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens >= limit:
        raise ValueError(
            f"the model has {limit} positions, which {num_tokens} new tokens and a prompt do not fit into; "
            f"ask for at most {limit - 1}"
        )
    kept = slice(None if limit is None else num_tokens - limit, None)  # the last `limit - num_tokens` tokens
    greedy = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, num_beams=1, use_cache=True)
    texts, seconds = [], []
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        plain = copy.copy(model)  # shares everything with the model but for what is set here
        plain.generation_config = GenerationConfig()  # transformers fills the gaps in `greedy` from this one
        for count, prompt in enumerate(prompts, start=1):
            ids = torch.tensor([list(prompt)[kept]], dtype=torch.long, device=model.device)
            start = time.perf_counter()
            output = plain.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), generation_config=greedy
            )
            texts.append(output[0, ids.shape[1] :].tolist())  # waits for the accelerator, if there is one
            seconds.append((time.perf_counter() - start) / num_tokens)
            if progress is not None:
                progress(count / len(prompts))
    finally:
        for module, training in modes:
            module.training = training
    return texts, statistics.median(seconds)


def measure(texts: Sequence[Sequence[int]], seconds: float) -> Generation:
    """The figures of texts that `generate` wrote, from their tokens and the seconds per token.

    Raises ValueError when there is no text.
    """
    if not texts:
        raise ValueError("there is no text to measure")
    distinct = [_distinct([ngram for text in texts for ngram in _ngrams(text, size)]) for size in (1, 2, 3)]
    return Generation(
        tokens=round(statistics.fmean(len(text) for text in texts)),
        repeated_ngrams=statistics.fmean(1 - _distinct(_ngrams(text, NGRAM)) for text in texts),
        longest_loop=max(_longest_loop(text) for text in texts),
        distinct_1=distinct[0],
        distinct_2=distinct[1],
        distinct_3=distinct[2],
        tokens_per_second=1 / seconds,
    )


def compare(dense: Generation, pruned: Generation) -> tuple[str, ...]:
    """A sentence for each figure by which the pruned model repeats itself clearly more; none when all is well.

    Both must have continued the same prompts; 16 or more tell damage from chance much better than 8 (see the constants
    above). Raises ValueError when the texts differ in length.
    """
    if dense.tokens != pruned.tokens:
        raise ValueError(f"texts of {dense.tokens} tokens and of {pruned.tokens} cannot be compared; generate as many")
    warnings = []
    rise = pruned.repeated_ngrams - dense.repeated_ngrams
    if rise > REPEATED_RISE:
        warnings.append(
            f"The pruned model repeats itself: {pruned.repeated_ngrams:.0%} of its phrases of {NGRAM} tokens occurred "
            f"before in the same text, and {dense.repeated_ngrams:.0%} of the dense model's."
        )
    begins = dense.longest_loop <= NO_LOOP_SHARE * dense.tokens and pruned.longest_loop >= LOOP_SHARE * pruned.tokens
    if begins and rise > LOOP_RISE:
        warnings.append(
            f"The pruned model gets stuck: it repeats one phrase over {pruned.longest_loop} of {pruned.tokens} tokens, "
            f"and the dense model over {dense.longest_loop or 'none'}."
        )
    sizes = {1: "tokens", 2: "pairs of tokens", 3: "triples of tokens"}
    ratios = {n: getattr(pruned, f"distinct_{n}") / getattr(dense, f"distinct_{n}") for n in sizes}
    worst = min(ratios, key=lambda n: ratios[n])
    if ratios[worst] < DISTINCT_RATIO:
        warnings.append(
            f"The pruned model says less that is new: over all texts it has {ratios[worst]:.0%} as many different "
            f"{sizes[worst]} as the dense model."
        )
    return tuple(warnings)


def _ngrams(text: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(text[start:] for start in range(size)), strict=False))


def _distinct(ngrams: Sequence[tuple[int, ...]]) -> float:
    """The different n-grams over all; 1 where there is none to repeat."""
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def _longest_loop(text: Sequence[int]) -> int:
    """See `Generation.longest_loop`. A run of R tokens that equal the one P before them is a loop of P + R tokens."""
    tokens = np.asarray(text, dtype=np.int64)  # [L]
    longest = 0
    for phrase in range(1, min(LONGEST_PHRASE, len(tokens) // FEWEST_COPIES) + 1):
        same = np.concatenate(([False], tokens[phrase:] == tokens[:-phrase], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])  # where runs begin and end, in turn
        run = int((edges[1::2] - edges[::2]).max(initial=0))
        if phrase + run >= FEWEST_COPIES * phrase:
            longest = max(longest, phrase + run)
    return longest
