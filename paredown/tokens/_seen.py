"""What a scorer sees of the texts after a layer, and how many tokens a policy lets through.

Legend: G texts of one length, n tokens of each, H heads, K head size, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from paredown.types import TokenPolicy, TokenStage

EVIDENCE = ("stream", "keys", "attention", "first_attention", "ids", "positions", "gate")
CERTAIN = 1e-9  # a count that misses a whole number by less than this is that number: shares are written in decimals


@dataclass(frozen=True)
class Seen:
    """Texts of one length after a layer; a scorer's `NEEDS` names the fields that it reads, the others are None.

    `stream` [G, n, D] as the layer left it, `keys` [G, H, n, K] of that layer, `attention` [G, H, n, n] from queries to
    keys and `first_attention` [G, H, n] of the first query alone, `ids` and `positions` [G, n] of the tokens, `gate`
    [D] of a trained scorer. In an exported graph texts are padded: `real` [G, n] is then 1 for tokens and 0 for
    padding, whose scores do not matter.
    """

    stream: Tensor | None = None
    keys: Tensor | None = None
    attention: Tensor | None = None
    first_attention: Tensor | None = None
    ids: Tensor | None = None
    positions: Tensor | None = None
    gate: Tensor | None = None
    real: Tensor | None = None


class Scoring(nn.Module):
    """A scorer's `score` as a module of `real` [G, n] and the fields that it `needs`, in this order: for tracing."""

    def __init__(self, scorer: ModuleType):
        super().__init__()
        self.needs: tuple[str, ...] = scorer.NEEDS
        self._score: Callable[[Seen], Tensor] = scorer.score

    def forward(self, real: Tensor, evidence: tuple[Tensor, ...]) -> Tensor:
        return self._score(Seen(**dict(zip(self.needs, evidence, strict=True)), real=real))


def count(policy: TokenPolicy, stage: TokenStage, tokens: int) -> int:
    """How many of a text's tokens stay by a ratio or a quantile: it depends on their number alone.

    With a quantile q those stay whose score is at least the q-quantile (linearly interpolated), so that of n different
    scores n - ceil(q (n - 1)) do.
    """
    if policy.rule == "ratio":
        stay = math.ceil(stage.keep * tokens - CERTAIN)
    else:
        stay = tokens - math.ceil(stage.keep * (tokens - 1) - CERTAIN)
    return min(tokens, max(policy.least, stay))
