"""Texts of a batch without their padding: the tokens in one matrix, texts of one length side by side.

Legend: B texts, N tokens of all texts, G texts of one length, n tokens of each, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paredown.errors import BadData


@dataclass(frozen=True)
class Group:
    """`texts` of `tokens` each, side by side; `exempt` ones never lose any."""

    texts: int
    tokens: int
    exempt: bool


@dataclass(frozen=True)
class Texts:
    """Per token: the stream `x` [N, D], `ids`, `positions`, `special` [N], and `sizes` [N] where tokens are merged.

    Per text: `rows` [B], where in the batch it came from, its original `lengths` [B], and `gone` [B, D], what its
    dropped tokens add to the sum over its tokens.
    """

    groups: tuple[Group, ...]
    x: Tensor
    ids: Tensor
    positions: Tensor
    special: Tensor
    sizes: Tensor | None
    rows: Tensor
    lengths: Tensor
    gone: Tensor | None = None

    def spans(self) -> Iterator[tuple[Group, slice, slice]]:
        """Each group with the tokens and the texts that are its."""
        token = text = 0
        for group in self.groups:
            width = group.texts * group.tokens
            yield group, slice(token, token + width), slice(text, text + group.texts)
            token, text = token + width, text + group.texts

    def firsts(self) -> Tensor:
        """[B]: where each text begins."""
        starts = [
            torch.arange(tokens.start, tokens.stop, group.tokens, device=self.x.device)
            for group, tokens, _ in self.spans()
        ]
        return torch.cat(starts)

    def owners(self) -> Tensor:
        """[N]: the row of the batch that each token came from."""
        found = [self.rows[texts].repeat_interleave(group.tokens) for group, _, texts in self.spans()]
        return torch.cat(found)

    def kept(self, keep: Sequence[Tensor]) -> Texts:
        """Without the tokens that `keep` does not name: a bool [G, n] for each group."""
        groups: list[Group] = []
        order: list[Tensor] = []
        for (group, _, texts), mask in zip(self.spans(), keep, strict=True):
            counts, where = mask.sum(1).sort(stable=True)
            left, number = torch.unique_consecutive(counts, return_counts=True)
            groups += [
                Group(texts, tokens, group.exempt) for tokens, texts in zip(left.tolist(), number.tolist(), strict=True)
            ]
            order.append(where + texts.start)
        turned = torch.cat(order)
        tokens = torch.cat([mask.flatten() for mask in keep]).nonzero().squeeze(1)
        if bool((turned[1:] < turned[:-1]).any()):  # texts of one length kept different numbers: they change places
            owner = torch.repeat_interleave(
                torch.arange(len(turned), device=turned.device), torch.cat([mask.sum(1) for mask in keep])
            )
            tokens = tokens[turned.argsort()[owner].argsort(stable=True)]
        return replace(
            self,
            groups=joined(groups),
            **{name: getattr(self, name)[tokens] for name in ("x", "ids", "positions", "special")},
            sizes=None if self.sizes is None else self.sizes[tokens],
            rows=self.rows[turned],
            lengths=self.lengths[turned],
            gone=None if self.gone is None else self.gone[turned],
        )


def joined(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Neighbours that are alike become one."""
    found: list[Group] = []
    for group in groups:
        if found and (found[-1].tokens, found[-1].exempt) == (group.tokens, group.exempt):
            found[-1] = replace(group, texts=found[-1].texts + group.texts)
        elif group.texts:
            found.append(group)
    return tuple(found)


def packed(
    x: Tensor, ids: Tensor, attention_mask: Tensor, *, special_ids: Sequence[int], exempt: int, sized: bool
) -> Texts:
    """The real tokens of a padded batch [B, T, D], short texts first; those of up to `exempt` tokens are exempt.

    Raises BadData for a text that has none.
    """
    real = attention_mask.bool()
    lengths, rows = real.sum(1).sort(stable=True)
    if not len(rows) or int(lengths[0]) < 1:
        raise BadData("a text without any token cannot be run")
    flat = torch.arange(real.numel(), device=real.device).view_as(real)[rows][real[rows]]
    counts, number = torch.unique_consecutive(lengths, return_counts=True)
    groups = [
        Group(texts, tokens, tokens <= exempt) for tokens, texts in zip(counts.tolist(), number.tolist(), strict=True)
    ]
    ids = ids.flatten()[flat]
    return Texts(
        groups=joined(groups),
        x=x.flatten(0, 1)[flat],
        ids=ids,
        positions=flat % real.shape[1],
        special=torch.isin(ids, torch.tensor(special_ids, dtype=ids.dtype, device=ids.device)),
        sizes=x.new_ones(len(flat)) if sized else None,
        rows=rows,
        lengths=lengths,
    )
