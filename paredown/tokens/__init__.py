"""SKIP IT: run-time token pruning. One file per scorer, higher = keep; `Packed` runs an encoder by a policy.

A scorer's file says in `NEEDS` which fields of `Seen` it reads, and has `score(seen)`: [G, n]. One that reads the
stream or a gate is asked behind a layer, any other inside its attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from paredown.encoder import Encoder
from paredown.tokens._fit import fit
from paredown.tokens._packed import Packed
from paredown.tokens._seen import Seen, count
from paredown.types import TokenPolicy

__all__ = ["Packed", "Seen", "applied", "count", "fit"]


def applied(encoder: Encoder, policy: TokenPolicy, tensors: Mapping[str, Tensor] | None = None) -> Encoder | Packed:
    """The encoder with the policy at work; itself where the policy can drop nothing."""
    return encoder if policy.is_identity else Packed(encoder, policy, tensors)
