"""Where zeros may be: anywhere, n of every m inputs, or in blocks.

Legend: O outputs, K inputs of a weight matrix as torch has it, [O, K].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.errors import ParedownError, UnsupportedModel

WHOLE, ROW = "whole", "row"  # what competes with what: all weights of the matrix, or those of one output


@dataclass(frozen=True)
class Pattern:
    """`kind` "unstructured"; "n:m", of every `m` consecutive inputs of an output at most `n` are not zero; or "block",
    `rows` outputs times `columns` inputs are zero together.
    """

    kind: str = "unstructured"
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Of "unstructured", "2:4", "4x1" and the like. Raises ParedownError."""
        name = text.strip().lower()
        if name == "unstructured":
            return cls()
        if found := re.fullmatch(r"(\d+):(\d+)", name):
            n, m = map(int, found.groups())
            if not 0 < n < m:
                raise ParedownError(f"A pattern {text} keeps nothing or all: in n:m, n lies between 0 and m.")
            return cls("n:m", n=n, m=m)
        if found := re.fullmatch(r"(\d+)x(\d+)", name):
            rows, columns = map(int, found.groups())
            if rows * columns > 1:
                return cls("block", rows=rows, columns=columns)
        raise ParedownError(
            f"There is no pattern {text!r}; there are unstructured, n:m such as 2:4, blocks such as 4x1."
        )

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.rows}x{self.columns}" if self.kind == "block" else self.kind

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself says."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix divides into its groups or blocks."""
        rows, columns = shape
        return columns % (self.m or 1) == 0 and rows % self.rows == 0 and columns % self.columns == 0

    def zeros(self, shape: tuple[int, int], sparsity: float) -> int:
        """How many weights of a matrix are zero at a sparsity: whole blocks, the nearest number."""
        total = shape[0] * shape[1]
        if self.kind == "n:m":
            return total // self.m * (self.m - self.n)
        size = self.rows * self.columns
        return round(sparsity * total / size) * size

    def kept(self, scores: Tensor, zeros: int, *, among: str = WHOLE) -> Tensor:
        """Which weights stay, bool [O, K]: all but exactly `zeros` of the lowest scores [O, K]; of equal ones the
        earlier stays. A block's score is the sum over it. `among` is what competes; in n:m, m neighbours do.

        Raises UnsupportedModel where the matrix does not divide.
        """
        shape = (scores.shape[0], scores.shape[1])
        if not self.fits(shape):
            raise UnsupportedModel(f"a matrix of {shape[0]} x {shape[1]} does not divide into {self}")
        if self.kind == "n:m":
            groups = scores.reshape(-1, self.m)
            return _all_but(groups, torch.full((len(groups),), self.m - self.n)).reshape(shape)
        if self.kind == "block":
            blocks = scores.reshape(shape[0] // self.rows, self.rows, -1, self.columns).sum((1, 3))
            size = self.rows * self.columns
            stay = _competing(blocks, zeros // size, among)
            return stay.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return _competing(scores, zeros, among)

    def holds(self, weight: Tensor) -> bool:
        """Whether the zeros of a weight matrix [O, K] are where the pattern has them."""
        zero = weight == 0
        if self.kind == "n:m":
            return bool((zero.reshape(-1, self.m).sum(1) >= self.m - self.n).all())
        if self.kind == "block":
            blocks = zero.reshape(weight.shape[0] // self.rows, self.rows, -1, self.columns).sum((1, 3))
            return bool(((blocks == 0) | (blocks == self.rows * self.columns)).all())
        return True


def _competing(scores: Tensor, zeros: int, among: str) -> Tensor:
    if among == WHOLE:
        return _all_but(scores.reshape(1, -1), torch.tensor([zeros])).reshape(scores.shape)
    ends = torch.arange(len(scores) + 1) * zeros // max(1, len(scores))  # as even as whole numbers can be
    return _all_but(scores, ends.diff())


def _all_but(scores: Tensor, zeros: Tensor) -> Tensor:
    """bool [R, N]: in each row all but its number of lowest scores, of equal ones the later first."""
    order = scores.flip(1).argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1]).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).flip(1)
    return rank >= zeros[:, None]
