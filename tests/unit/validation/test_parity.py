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


def off(count: int, by: float = 1.0) -> Any:
    """The first `count` texts of every long batch of 64 are wrong by so much; there are 216 texts in all."""

    def run(inputs: Mapping[str, Any]) -> Any:
        out = summed(inputs)
        if inputs["input_ids"].shape == (64, 64):
            out[:count] += by
        return out

    return run


def test_a_share_of_texts_may_stray() -> None:
    about: dict[str, Any] = {"input_names": NAMES, "vocabulary": 50, "tolerance": 0.01}
    assert check(summed, off(4), strays=4 / 216, **about) == 0  # what strays is not the largest difference
    with pytest.raises(ParityFailure, match=r"^5 of 216 texts differ by more than 0\.01$"):
        check(summed, off(5), strays=4 / 216, **about)
    with pytest.raises(ParityFailure, match="batch of 64 long texts"):
        check(summed, off(1), **about)  # without any share none may
    assert check(summed, off(64, 0.005), strays=0.01, **about) == pytest.approx(0.005, abs=1e-4)
    with pytest.raises(ParityFailure, match="of 216 texts differ"):
        check(summed, lambda x: summed(x) + 0.02, strays=0.5, **about)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_never_strays(value: float) -> None:
    with pytest.raises(ParityFailure, match=f"batch of 64 long texts .* differ by {value}"):
        check(summed, off(1, value), input_names=NAMES, vocabulary=50, strays=0.9)
    with pytest.raises(ParityFailure, match="shapes"):
        check(summed, lambda x: summed(x)[:, 0], input_names=NAMES, vocabulary=50, strays=0.9)
