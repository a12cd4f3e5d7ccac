"""Patterns keep exactly what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paredown.errors import ParedownError, UnsupportedModel
from paredown.sparsity import Pattern
from paredown.sparsity._pattern import ROW, WHOLE


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "4:8", "4x1", "8x2"])
def test_a_pattern_reads_what_it_writes(text: str) -> None:
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "4:4", "1x1", "sparse", "2:4:8", "-2:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ParedownError, match="pattern"):
        Pattern.parse(text)


@given(
    st.sampled_from(["unstructured", "2:4", "1:4", "4:8", "4x1"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from([WHOLE, ROW]),
    st.booleans(),
)
def test_exactly_the_asked_number_goes_and_the_lowest_do(
    text: str, rows: int, columns: int, sparsity: float, among: str, tied: bool
) -> None:
    pattern, shape = Pattern.parse(text), (4 * rows, 8 * columns)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) + 0.1
    scores = torch.ones(shape) if tied else scores
    zeros = pattern.zeros(shape, sparsity)
    keep = pattern.kept(scores, zeros, among=among)
    assert int((~keep).sum()) == zeros and pattern.holds(scores * keep)
    if pattern.kind == "unstructured" and among == WHOLE and 0 < zeros < keep.numel():
        assert scores[~keep].max() <= scores[keep].min()
    if pattern.kind == "n:m":
        assert (keep.reshape(-1, pattern.m).sum(1) == pattern.n).all()
        groups, stay = scores.reshape(-1, pattern.m), keep.reshape(-1, pattern.m)
        assert (groups.masked_fill(stay, -1).amax(1) <= groups.masked_fill(~stay, 2).amin(1)).all()
    elif among == ROW:
        gone = (~keep).sum(1) if pattern.kind == "unstructured" else (~keep).reshape(rows, 4, -1).sum((1, 2))
        assert int(gone.max() - gone.min()) <= (1 if pattern.kind == "unstructured" else 4)


def test_a_block_is_scored_by_its_sum() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 3.0]])
    assert Pattern.parse("4x1").kept(scores, 4).tolist() == [[True, False]] * 4


@pytest.mark.parametrize(("text", "shape"), [("2:4", (3, 6)), ("4x1", (6, 4))])
def test_what_does_not_divide_is_refused(text: str, shape: tuple[int, int]) -> None:
    pattern = Pattern.parse(text)
    assert not pattern.fits(shape)
    with pytest.raises(UnsupportedModel, match="does not divide"):
        pattern.kept(torch.rand(shape), 0)


def test_zeros_elsewhere_are_noticed() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    assert not Pattern.parse("2:4").holds(weight) and Pattern.parse("3:4").holds(weight)
    assert not Pattern.parse("1x2").holds(weight)
