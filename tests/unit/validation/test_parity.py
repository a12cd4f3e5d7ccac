"""The parity check must see every difference and every kind of batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from paredown.errors import ParityFailure
from paredown.validation.parity import check

NAMES = ("input_ids", "attention_mask")


def summed(inputs: Mapping[str, Any]) -> Any:
    return (inputs["input_ids"] * inputs["attention_mask"]).sum(1, keepdims=True).astype(np.float32)


def test_it_returns_the_largest_difference() -> None:
    assert check(summed, summed, input_names=NAMES, vocabulary=50) == 0
    worst = check(summed, lambda x: summed(x) + 0.25, input_names=NAMES, vocabulary=50, tolerance=0.5)
    assert worst == pytest.approx(0.25)


def test_batches_are_ragged_of_all_sizes_and_seeded() -> None:
    seen: list[Mapping[str, Any]] = []

    def record(inputs: Mapping[str, Any]) -> Any:
        seen.append(inputs)
        return summed(inputs)

    check(record, summed, input_names=(*NAMES, "token_type_ids"), vocabulary=50)
    shapes = [inputs["input_ids"].shape for inputs in seen]
    assert shapes == [(size, length) for size in (1, 7, 64) for length in (15, 64, 2)]
    for inputs in seen:
        assert set(inputs) == {*NAMES, "token_type_ids"}
        assert inputs["input_ids"].max() < 50
        assert all(array.dtype == np.int64 for array in inputs.values())
        assert (inputs["attention_mask"][:, :2] == 1).all()
        assert (np.diff(inputs["attention_mask"], axis=1) <= 0).all()  # padding on the right
    lengths = seen[7]["attention_mask"].sum(1)
    assert lengths.min() == 2
    assert lengths.max() == 64
    again: list[Mapping[str, Any]] = seen[:]
    seen.clear()
    check(record, summed, input_names=NAMES, vocabulary=50)
    np.testing.assert_array_equal(seen[4]["input_ids"], again[4]["input_ids"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: summed(x) + (len(x["input_ids"]) == 7), r"batch of 7 short texts .* differ by 1, above 0\.0001"),
        (lambda x: summed(x) + (x["input_ids"].shape[1] == 2), r"batch of 1 shortest texts"),
        (lambda x: summed(x) * np.nan, r"differ by nan"),
        (lambda x: summed(x)[:, 0], r"shapes \(1, 1\) and \(1,\)"),
    ],
)
def test_a_failure_names_the_batch(wrong: Any, message: str) -> None:
    with pytest.raises(ParityFailure, match=message):
        check(summed, wrong, input_names=NAMES, vocabulary=50)


def test_two_texts_in_a_hundred_may_stray_where_tokens_are_dropped() -> None:
    def straying(every: int) -> Any:
        def run(inputs: Mapping[str, Any]) -> Any:
            found = summed(inputs)
            found[every - 1 :: every] += 1
            return found

        return run

    how: dict[str, Any] = {"input_names": NAMES, "vocabulary": 50}
    assert check(summed, straying(60), strays=0.02, **how) == 0  # three of 216
    with pytest.raises(ParityFailure, match="differ by 1, above"):
        check(summed, straying(60), **how)
    with pytest.raises(ParityFailure, match="of 216 texts differ by more"):
        check(summed, straying(20), strays=0.02, **how)

    def broken(inputs: Mapping[str, Any]) -> Any:
        found = summed(inputs)
        found[-1] = np.nan
        return found

    with pytest.raises(ParityFailure, match="differ by nan"):
        check(summed, broken, strays=0.5, **how)
