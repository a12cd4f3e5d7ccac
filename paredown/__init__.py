"""Pare a trained model down to what your machine serves fast, and prove it.

This file is the table of contents: the verbs, the nouns and the errors. Each is loaded when it is first used, so that
`import paredown` costs nothing and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paredown.anatomy import describe
    from paredown.bundle import load
    from paredown.errors import (
        BadData,
        CorruptBundle,
        FingerprintMismatch,
        GateFailed,
        InfeasibleBudget,
        MissingExtra,
        ParedownError,
        ParityFailure,
        UnsupportedModel,
    )
    from paredown.importance import score
    from paredown.pipeline import (
        EmbedderSettings,
        SearchSettings,
        StudySettings,
        TokenSettings,
        bench,
        bench_sparse,
        compare,
        distill_embedder,
        fewshot,
        prune,
        search_tokens,
        sensitivity,
        sparsify,
        sweep_tokens,
        train_embedder,
        validate,
    )
    from paredown.planning import Shares, by_shares, plan
    from paredown.recovery import recover
    from paredown.surgery import cut, mask
    from paredown.targets import export
    from paredown.types import (
        Anatomy,
        Budget,
        Counter,
        Group,
        Interval,
        Layout,
        Limits,
        Measurement,
        Plan,
        Report,
        Runner,
        Scores,
        Slice,
        TokenPolicy,
        TokenStage,
    )

__version__ = "0.1.0"

# Where each public name lives. The block above says the same to type checkers; a test compares the two.
_CONTENTS = {
    "anatomy": ("describe",),
    "bundle": ("load",),
    "errors": (
        "BadData",
        "CorruptBundle",
        "FingerprintMismatch",
        "GateFailed",
        "InfeasibleBudget",
        "MissingExtra",
        "ParedownError",
        "ParityFailure",
        "UnsupportedModel",
    ),
    "importance": ("score",),
    "pipeline": (
        "EmbedderSettings",
        "SearchSettings",
        "StudySettings",
        "TokenSettings",
        "bench",
        "bench_sparse",
        "compare",
        "distill_embedder",
        "fewshot",
        "prune",
        "search_tokens",
        "sensitivity",
        "sparsify",
        "sweep_tokens",
        "train_embedder",
        "validate",
    ),
    "planning": ("Shares", "by_shares", "plan"),
    "recovery": ("recover",),
    "surgery": ("cut", "mask"),
    "targets": ("export",),
    "types": (
        "Anatomy",
        "Budget",
        "Counter",
        "Group",
        "Interval",
        "Layout",
        "Limits",
        "Measurement",
        "Plan",
        "Report",
        "Runner",
        "Scores",
        "Slice",
        "TokenPolicy",
        "TokenStage",
    ),
}
_HOMES = {name: f"paredown.{module}" for module, names in _CONTENTS.items() for name in names}

__all__ = [
    "Anatomy",
    "BadData",
    "Budget",
    "CorruptBundle",
    "Counter",
    "EmbedderSettings",
    "FingerprintMismatch",
    "GateFailed",
    "Group",
    "InfeasibleBudget",
    "Interval",
    "Layout",
    "Limits",
    "Measurement",
    "MissingExtra",
    "ParedownError",
    "ParityFailure",
    "Plan",
    "Report",
    "Runner",
    "Scores",
    "SearchSettings",
    "Shares",
    "Slice",
    "StudySettings",
    "TokenPolicy",
    "TokenSettings",
    "TokenStage",
    "UnsupportedModel",
    "bench",
    "bench_sparse",
    "by_shares",
    "compare",
    "cut",
    "describe",
    "distill_embedder",
    "export",
    "fewshot",
    "load",
    "mask",
    "plan",
    "prune",
    "recover",
    "score",
    "search_tokens",
    "sensitivity",
    "sparsify",
    "sweep_tokens",
    "train_embedder",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
