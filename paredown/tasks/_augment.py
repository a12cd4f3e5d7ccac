"""More texts to learn from, out of those there are: words left out, texts spliced, words borrowed from others.

A teacher that has seen its training texts says little new about them; on these it has to decide afresh. The recipe is
that of "easy data augmentation" (Wei and Zou 2019, arXiv:1901.11196) with splices added; no labels are needed, since
the teacher labels what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def augment(texts: Sequence[str], count: int, *, seed: int = 0) -> tuple[str, ...]:
    """`count` new texts. A third each: two texts spliced or joined, a fifth of the words left out, words exchanged."""
    rng = np.random.default_rng(seed)
    words = [text.split() for text in texts]
    words = [one for one in words if one]
    if not words:
        return ()
    out = []
    for _ in range(count):
        one = words[rng.integers(len(words))]
        other = words[rng.integers(len(words))]
        kind = rng.random()
        if kind < 0.35:
            if rng.random() < 0.5:
                made = one[: rng.integers(len(one) + 1)] + other[rng.integers(len(other) + 1) :]
            else:
                made = one + other
        elif kind < 0.7:
            made = [word for word, stays in zip(one, rng.random(len(one)) > 0.2, strict=True) if stays]
        else:
            change = rng.random(len(one)) < rng.random() * 0.3
            made = [other[rng.integers(len(other))] if swap else word for word, swap in zip(one, change, strict=True)]
        out.append(" ".join(made or one))
    return tuple(out)
