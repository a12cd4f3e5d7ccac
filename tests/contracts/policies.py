"""Tiny encoders with token policies, and the ragged texts to try them on: for the contracts of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from paredown import registry
from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.tokens import Packed
from paredown.types import TokenPolicy, TokenStage
from tests.contracts.families import CASES, DECODERS, batch, tiny

SCORERS = registry.available("tokens")
ENCODERS = [(family, task) for family, task in CASES if family not in DECODERS]
LENGTHS = (11, 9, 9, 7, 7, 7, 3, 2, 1)
SPECIAL = (2, 3)  # ids that `batch` never draws
RULES: dict[str, dict[str, Any]] = {
    "ratio": {"rule": "ratio", "stages": (TokenStage(1, 0.6),)},
    "two ratios": {"rule": "ratio", "stages": (TokenStage(1, 0.7), TokenStage(2, 0.5)), "least": 2},
    "quantile": {"rule": "quantile", "stages": (TokenStage(1, 0.5), TokenStage(2, 0.3)), "least": 4},
    "switched off": {"rule": "ratio", "stages": (TokenStage(1, 0.4),), "off_below": 7},
}


def example(
    family: str, task: str, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0, pooling: str = "", **changes: Any
) -> tuple[Encoder, dict[str, Tensor]]:
    """A tiny encoder and ragged texts for it. It pools as its task does, unless `pooling` says else."""
    model = tiny(family, task, num_hidden_layers=4, **changes)
    pooling = pooling or ("cls" if task == "text-classification" else "mean")
    return Encoder(model, describe(model, pooling=pooling).layout), ragged(model, lengths, seed=seed)


def ragged(model: Any, lengths: tuple[int, ...], *, seed: int = 0) -> dict[str, Tensor]:
    """Texts, not in the order of their lengths, that begin and end with a special token."""
    inputs = batch(model, lengths=lengths, seed=seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(lengths)))
    inputs = {name: tensor[order] for name, tensor in inputs.items()}
    ends = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][:, 0] = SPECIAL[0]
    inputs["input_ids"][torch.arange(len(order)), ends] = SPECIAL[1]
    return inputs


def trained(encoder: Encoder, policy: TokenPolicy) -> dict[str, Tensor]:
    """Seeded tensors for whatever a policy may need."""
    random, width = torch.Generator().manual_seed(7), encoder.layout.width
    found = {}
    for stage in policy.stages:
        found[f"gate.{stage.after}"] = torch.randn(width, generator=random)
        found[f"exit.{stage.after}.weight"] = torch.randn(width, width, generator=random) / width
        found[f"exit.{stage.after}.bias"] = torch.randn(width, generator=random)
    return found


def median_score(encoder: Encoder, scorer: str, inputs: dict[str, Tensor]) -> float:
    """Half of all tokens score below it behind the first layer; none just that, which rounding would decide."""
    policy, found = TokenPolicy(scorer, (TokenStage(1, 0.5),), special_ids=SPECIAL), []
    packed = Packed(encoder, policy, trained(encoder, policy))
    module = packed.scorer
    spy = SimpleNamespace(NEEDS=module.NEEDS, score=lambda seen: found.append(module.score(seen)) or found[-1])
    packed.scorer = cast(Any, spy)
    with torch.no_grad():
        packed(**inputs)
    values = torch.cat([scores.flatten() for scores in found]).unique()
    return float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())
