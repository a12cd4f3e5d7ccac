"""Which texts are timed together, and how many are judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from paredown.pipeline._prepare import affordable, timed_batches, timing_batches
from paredown.tasks import Tokens, similar_lengths
from paredown.types import Array


def tokens(lengths: Sequence[int] | Array) -> Tokens:
    return Tokens(tuple(np.full(n, 5, dtype=np.int64) for n in lengths), 0, ("input_ids", "attention_mask"), 0)


def served(lengths: Array) -> list[list[int]]:
    """All texts in the batches in which they would be served."""
    every = similar_lengths(lengths, np.arange(len(lengths)), batch_size=64, most_tokens=4096)
    return [at.tolist() for at in every]


def test_whole_batches_of_evenly_spread_ranks_are_timed() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 64 * 20)
    chosen = [at.tolist() for at in timed_batches(tokens(lengths))]
    every = served(lengths)
    assert len(every) == 20
    assert [every.index(at) for at in chosen] == [5, 15]  # 128 texts: the middles of both halves
    assert [every.index(at.tolist()) for at in timed_batches(tokens(lengths), most_tokens=10**9)] == [5, 15]


def test_what_is_timed_is_as_long_as_what_is_served() -> None:
    lengths = np.random.default_rng(0).lognormal(2.5, 0.5, 64 * 40).astype(int) + 2
    timed = np.concatenate(timed_batches(tokens(lengths)))
    assert 0.8 < lengths[timed].mean() / lengths.mean() < 1.1  # both middles lie below the longest ones
    assert len(set(timed.tolist())) == len(timed)


def test_a_small_budget_times_a_part_of_the_middle_batch() -> None:
    lengths = np.repeat(np.arange(10, 31), 64)  # 21 batches, each of one length; 20 tokens on average
    every = served(lengths)
    (part,) = timed_batches(tokens(lengths), most_tokens=20 * 32)
    assert part.tolist() == every[10][1::2]  # every other one of the middle batch
    (least,) = timed_batches(tokens(lengths), most_tokens=1)
    assert len(least) == 8 and set(least.tolist()) <= set(every[10])
    assert np.ptp(np.diff(least)) <= 1


def test_long_texts_come_in_small_batches_and_few() -> None:
    chosen = timed_batches(tokens([512] * 100))
    assert [len(at) for at in chosen] == [8, 8]  # 4096 tokens of a batch, about 8000 of all
    few = timed_batches(tokens([3, 9, 4]))
    assert [at.tolist() for at in few] == [[0, 2, 1]]
    assert [at.tolist() for at in timed_batches(tokens([600]))] == [[0]]


def test_texts_are_padded_no_more_than_where_they_are_served() -> None:
    lengths = np.random.default_rng(1).integers(2, 64, 1000)
    batches, singles = timing_batches(tokens(lengths))
    assert len(batches) == 2 and len(singles) == 32
    for inputs in batches:
        real = inputs["attention_mask"].sum(1)
        assert inputs["input_ids"].shape == (len(real), real.max()) and real.max() - real.min() < 10
    ranks = [inputs["input_ids"].shape for inputs in singles]
    assert all(rows == 1 for rows, _ in ranks)
    wanted = np.sort(lengths)[((np.arange(32) + 0.5) * 1000 / 32).astype(int)]
    assert [width for _, width in ranks] == wanted.tolist()


@pytest.mark.parametrize(
    ("least", "most", "count"),
    [
        (1, 100, 10),  # ten texts of 10 hold just 100
        (1, 101, 11),
        (1, 99, 10),
        (1, 5, 1),
        (20, 100, 20),  # never fewer than that
        (1, 10**6, 50),  # nor more than there are
        (80, 100, 50),
    ],
)
def test_as_many_texts_are_judged_as_the_tokens_allow(least: int, most: int, count: int) -> None:
    found = affordable(tokens([10] * 50), least, most_tokens=most)
    assert type(found) is int and found == count


def test_a_text_of_several_rows_costs_all_of_them() -> None:
    rows = tokens([10, 10, 1, 1, 30, 1])
    pairs = np.array([0, 1, 2, 0, 1, 2])  # partners come after the texts: these cost 11, 40 and 2
    assert affordable(rows, 1, owner=pairs, most_tokens=12) == 2
    assert affordable(rows, 1, owner=pairs, most_tokens=10) == 1
    assert affordable(rows, 1, owner=pairs, most_tokens=52) == 3
    assert affordable(rows, 9, owner=pairs, most_tokens=1) == 3
