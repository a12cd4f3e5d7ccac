"""Whether two runners compute the same function.

Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paredown.errors import ParityFailure
from paredown.types import Array

Run = Callable[[Mapping[str, Array]], Array]
BATCHES = (1, 7, 64)
LONGEST = {"short": 15, "long": 64}  # tokens: a customer's question, and the usual limit for one
SHORTEST = 2  # the two special tokens of an empty text


def check(
    run_a: Run,
    run_b: Run,
    *,
    input_names: Sequence[str],
    vocabulary: int,
    tolerance: float = 1e-4,
    longest: int = 64,
    strays: float = 0.0,
    seed: int = 0,
) -> float:
    """The largest absolute difference between the two outputs over ragged random batches of 1, 7 and 64 texts.

    Each size comes short (up to 15 tokens), long (up to 64) and with all texts of 2 tokens; none is longer
    than `longest`, what the model takes. Raises ParityFailure,
    naming the batch, when a difference is above `tolerance`, is not a number, or the shapes differ.

    Where tokens are dropped, two that score alike but for rounding may change places: of all texts a share of `strays`
    may then differ, and does not count.
    """
    random = np.random.default_rng(seed)
    worst, texts, astray = 0.0, 0, 0
    for size in BATCHES:
        for kind, most in (*LONGEST.items(), ("shortest", SHORTEST)):
            inputs = _batch(random, size, min(most, longest), vocabulary)
            feed = {name: inputs[name] for name in input_names}
            a, b = np.asarray(run_a(feed)), np.asarray(run_b(feed))
            where = f"batch of {size} {kind} texts (up to {min(most, longest)} tokens)"
            if a.shape != b.shape:
                raise ParityFailure(f"{where}: the outputs have shapes {a.shape} and {b.shape}")
            differences = np.abs(a.astype(np.float64) - b).reshape(size, -1).max(1)
            wrong = ~(differences <= tolerance)  # also nan
            texts, astray = texts + size, astray + int(wrong.sum())
            if wrong.any() and (not strays or not np.isfinite(differences).all()):
                raise ParityFailure(f"{where}: the outputs differ by {differences.max():.3g}, above {tolerance:.3g}")
            worst = max(worst, float(differences[~wrong].max(initial=0.0)))
    if astray > strays * texts:
        raise ParityFailure(f"{astray} of {texts} texts differ by more than {tolerance:.3g}")
    return worst


def _batch(random: np.random.Generator, size: int, longest: int, vocabulary: int) -> dict[str, Array]:
    """Random tokens [B, T] with ragged lengths from SHORTEST to `longest`, at least one text of either length."""
    lengths = random.integers(SHORTEST, longest + 1, size)
    lengths[-1] = SHORTEST
    lengths[0] = longest
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    # From 5 on: the first ids are special tokens, among them padding, from which RoBERTa counts positions.
    ids = np.where(mask == 1, random.integers(min(5, vocabulary - 1), vocabulary, (size, longest)), 0)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
