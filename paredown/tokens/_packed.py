"""An encoder that computes on no padding, and on fewer tokens from layer to layer.

Linear maps, norms and activations run once over the tokens of all texts, attention once for all texts of one length,
without a mask. That is exact, and what dropping tokens builds on: the matrix of tokens gets shorter. The last layer of
a [CLS] model computes its first row alone.

Legend: B texts, N tokens of all texts, G texts of one length, n tokens of each, D model width, H heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown import registry
from paredown.encoder import Encoder, Layer
from paredown.errors import UnsupportedModel
from paredown.tokens._merge import merged
from paredown.tokens._seen import Scoring, Seen, count
from paredown.tokens._texts import Group, Texts, packed
from paredown.types import Layout, TokenPolicy, TokenStage

MOST_SCORES = 2**23  # attention weights held at a time where they are written out: 32 MiB


class Packed(nn.Module):
    """`encoder` run without padding, with tokens left out by `policy`; called as an `Encoder` is, it gives the same.

    `tensors` are those of the policy: `gate.<after>` [D] of the learned scorer, and of the linear exit
    `exit.<after>.weight` [D, D] and `exit.<after>.bias` [D]. `observer` is shown every stage: the texts before it, and
    which tokens stay (bool [G, n] per group). Borrows the encoder's modules, and reads which biases are zero when it is
    made: after training, make it anew. Raises UnsupportedModel where the policy does not fit the model.
    """

    def __init__(
        self,
        encoder: Encoder,
        policy: TokenPolicy | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        observer: Callable[[TokenStage, Texts, list[Tensor]], None] | None = None,
    ):
        super().__init__()
        self._observer = observer
        self.encoder = encoder
        self.policy = policy or TokenPolicy("norm")
        self.tensors = dict(tensors or {})
        self.scorer: ModuleType = registry.find("tokens", self.policy.scorer)
        self._stages = {stage.after: stage for stage in self.policy.stages}
        self._check()
        # after a fold the biases of keys and values are zeros: a pass over a matrix less for each
        read = [part for layer in encoder.layers for part in (layer.key, layer.value) if type(part) is nn.Linear]
        self._unbiased = {part for part in read if part.bias is None or not part.bias.any()}

    def _check(self) -> None:
        policy, layers, pooling = self.policy, self.encoder.layers, self.layout.pooling
        for after in self._stages:
            if after >= len(layers):
                raise UnsupportedModel(f"tokens cannot go after layer {after}: the model has {len(layers)} layers")
            if not layers[after - 1].num_heads and self._reads_attention:
                raise UnsupportedModel(f"layer {after} has no heads left, so nothing tells which tokens matter there")
            width = self.layout.width
            gated = "gate" in self.scorer.NEEDS and policy.action == "drop"  # merging looks at keys alone
            wanted = {f"gate.{after}": [width]} if gated else {}
            if policy.exit:
                wanted |= {f"exit.{after}.weight": [width, width], f"exit.{after}.bias": [width]}
            for name, shape in wanted.items():
                if name not in self.tensors:
                    raise UnsupportedModel(f"the token policy lacks its tensor {name}: fit it first")
                if list(self.tensors[name].shape) != shape:
                    found = list(self.tensors[name].shape)
                    raise UnsupportedModel(
                        f"the token policy was fitted to another model: {name} is {found}, not {shape}"
                    )
        if policy.exit and pooling != "mean":
            raise UnsupportedModel(
                f"a linear exit is for models that pool by the mean, and this one pools by {pooling}"
            )

    @property
    def layout(self) -> Layout:
        return self.encoder.layout

    @property
    def model(self) -> nn.Module:
        return self.encoder.model

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.encoder.input_names

    @property
    def output_name(self) -> str:
        return self.encoder.output_name

    @property
    def scoring(self) -> Scoring:
        """What an export traces to have the scores."""
        return Scoring(self.scorer)

    def count(self, stage: TokenStage, tokens: int) -> int:
        """How many of a text's tokens stay, by a ratio or a quantile."""
        return count(self.policy, stage, tokens)

    @property
    def _reads_attention(self) -> bool:
        """Whether what decides is known inside a layer's attention, rather than from the stream behind it."""
        return self.policy.action == "merge" or not {"stream", "gate"} & set(self.scorer.NEEDS)

    def train(self, mode: bool = True) -> Packed:
        """Stays in eval mode, as the encoder does."""
        super().train(False)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x = self.encoder.embed(input_ids, token_type_ids)
        bias = self._position_bias(x)
        texts = packed(
            x,
            input_ids,
            attention_mask,
            special_ids=self.policy.special_ids,
            exempt=max(self.policy.off_below, self.policy.least),
            sized=bool(self._stages) and self.policy.action == "merge",
        )
        last = len(self.encoder.layers) - 1
        for index, layer in enumerate(self.encoder.layers):
            stage = self._stages.get(index + 1)
            if index == last and self.layout.pooling == "cls":
                context, _ = self._attended(layer, texts, bias, None, first_only=True)
                firsts = texts.x[texts.firsts()]
                return self._answers(_fed(layer, firsts, context), texts)
            context, evidence = self._attended(layer, texts, bias, stage)
            texts = replace(texts, x=_fed(layer, texts.x, context))
            if stage is not None:
                texts = self._shortened(texts, evidence, stage)
        return self._answers(self._mean(texts), texts)

    def _position_bias(self, x: Tensor) -> Tensor | None:
        """[H, T, T], of a family that has one."""
        return self.encoder.position_bias(x) if self.layout.position_bias else None

    def _attended(
        self, layer: Layer, texts: Texts, bias: Tensor | None, stage: TokenStage | None, *, first_only: bool = False
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The heads' outputs [N, H*K] (of first tokens alone [B, H*K]), None without heads; and per group what decides
        which tokens stay: scores [G, n], or for merging the keys [G, n, K]. Empty where that is not read here.
        """
        if not layer.num_heads:
            return None, []
        keys, values = (_heads(self._projected(part, texts.x), layer) for part in (layer.key, layer.value))  # [N, H, K]
        queries = _heads(layer.query(texts.x[texts.firsts()] if first_only else texts.x), layer)
        contexts: list[Tensor] = []
        evidence: list[Tensor] = []
        wanted = stage is not None and self._reads_attention
        written = wanted and self.policy.action == "drop" and "attention" in self.scorer.NEEDS
        for group, tokens, rows in texts.spans():
            at = rows if first_only else tokens
            q, k, v = (
                part.unflatten(0, (group.texts, -1)).transpose(1, 2)
                for part in (queries[at], keys[tokens], values[tokens])
            )
            mask = _mask(texts, group, tokens, bias, layer, first_only)
            found: list[Tensor] = []
            size = max(1, MOST_SCORES // (layer.num_heads * group.tokens**2)) if written else group.texts
            for start in range(0, group.texts, size):
                part = slice(start, start + size)
                own = mask if mask is None or len(mask) == 1 else mask[part]
                if written:
                    attention = _weights(q[part], k[part], own)
                    out = attention @ v[part]
                    found.append(self.scorer.score(Seen(attention=attention)))
                else:
                    out = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=own)
                contexts.append(out.transpose(1, 2).flatten(0, 1))  # as it lies in memory
            if written:
                evidence.append(torch.cat(found))
            elif wanted and self.policy.action == "merge":
                evidence.append(k.mean(1))
            elif wanted:
                first = _weights(q[:, :, :1], k, mask)[:, :, 0] if "first_attention" in self.scorer.NEEDS else None
                evidence.append(self.scorer.score(replace(_about(texts, group, tokens), keys=k, first_attention=first)))
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return context.flatten(1), evidence

    def _projected(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, projection.weight) if projection in self._unbiased else cast(Tensor, projection(x))

    def _shortened(self, texts: Texts, evidence: list[Tensor], stage: TokenStage) -> Texts:
        """The texts without the tokens that go here."""
        if self.policy.action == "merge":
            return self._merged(texts, evidence, stage)
        keep: list[Tensor] = []
        for number, (group, tokens, _) in enumerate(texts.spans()):
            special = grouped(texts.special[tokens], group)
            if group.exempt:
                keep.append(torch.ones_like(special))
                continue
            scores = evidence[number] if self._reads_attention else self._scored(texts, group, tokens, stage)
            keep.append(staying(scores, special, self.policy, stage))
        if self._observer is not None:
            self._observer(stage, texts, keep)
        if self.policy.exit:
            texts = replace(texts, gone=self._gone(texts, keep, stage))
        return texts.kept(keep)

    def _scored(self, texts: Texts, group: Group, tokens: slice, stage: TokenStage) -> Tensor:
        """[G, n] by a scorer that reads the stream."""
        gate = self.tensors.get(f"gate.{stage.after}")
        about = _about(texts, group, tokens)
        found: Tensor = self.scorer.score(replace(about, stream=grouped(texts.x[tokens], group), gate=gate))
        return found

    def _merged(self, texts: Texts, keys: list[Tensor], stage: TokenStage) -> Texts:
        assert texts.sizes is not None
        x, sizes, keep = texts.x.clone(), texts.sizes.clone(), []
        for number, (group, tokens, _) in enumerate(texts.spans()):
            special = grouped(texts.special[tokens], group)
            if group.exempt:
                keep.append(torch.ones_like(special))
                continue
            stream, size = grouped(x[tokens], group), grouped(sizes[tokens], group)
            stay = count(self.policy, stage, group.tokens)
            stream, size, left = merged(stream, keys[number], size, special, stay)
            x[tokens], sizes[tokens] = stream.flatten(0, 1), size.flatten()
            keep.append(left)
        return replace(texts, x=x, sizes=sizes).kept(keep)

    def _gone(self, texts: Texts, keep: list[Tensor], stage: TokenStage) -> Tensor:
        """[B, D]: what dropped tokens add to the sum over a text's tokens, by the linear exit of this stage."""
        weight, bias = (self.tensors[f"exit.{stage.after}.{part}"] for part in ("weight", "bias"))
        sums, numbers = [], []
        for (group, tokens, _), left in zip(texts.spans(), keep, strict=True):
            dropped = (~left).to(texts.x.dtype)
            sums.append((dropped[:, None] @ grouped(texts.x[tokens], group))[:, 0])
            numbers.append(dropped.sum(1, keepdim=True))
        gone = torch.cat(sums) @ weight + torch.cat(numbers) * bias
        return gone if texts.gone is None else texts.gone + gone

    def _mean(self, texts: Texts) -> Tensor:
        """[B, D]: the mean over a text's tokens, dropped ones counting where the policy has an exit for them."""
        sums, numbers = [], []
        for group, tokens, _ in texts.spans():
            stream = grouped(texts.x[tokens], group)
            if texts.sizes is None:
                sums.append(stream.sum(1))
            else:
                sums.append((grouped(texts.sizes[tokens], group)[:, None] @ stream)[:, 0])
            numbers += [group.tokens] * group.texts
        total = torch.cat(sums)
        if texts.gone is not None:
            total = total + texts.gone
        if texts.gone is not None or texts.sizes is not None:
            return total / texts.lengths[:, None].to(total.dtype)
        return total / torch.tensor(numbers, dtype=total.dtype, device=total.device)[:, None]

    def _answers(self, pooled: Tensor, texts: Texts) -> Tensor:
        """Logits [B, C] or embeddings [B, D] in the order of the batch, from one vector per text [B, D]."""
        found = self.encoder.finish(pooled[:, None])
        answers = torch.empty_like(found)
        answers[texts.rows] = found
        return answers


def grouped(values: Tensor, group: Group) -> Tensor:
    """[G*n, ...] -> [G, n, ...]"""
    found: Tensor = values.unflatten(0, (group.texts, group.tokens))
    return found


def staying(scores: Tensor, special: Tensor, policy: TokenPolicy, stage: TokenStage) -> Tensor:
    """Which tokens stay, bool [G, n]: special ones, and those of the highest scores; of equal ones the earlier."""
    scores = scores.masked_fill(special, math.inf)
    if policy.rule == "threshold":
        stay = (scores >= stage.keep).sum(1).clamp(min=policy.least)
    else:
        stay = special.sum(1).clamp(min=count(policy, stage, scores.shape[1]))
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < stay[:, None]


def _about(texts: Texts, group: Group, tokens: slice) -> Seen:
    ids, positions = (grouped(part[tokens], group) for part in (texts.ids, texts.positions))
    return Seen(ids=ids, positions=positions)


def _heads(x: Tensor, layer: Layer) -> Tensor:
    """[N, H*K] -> [N, H, K]"""
    found: Tensor = x.unflatten(-1, (layer.num_heads, layer.head_dim))
    return found


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Where each query looks [G, H, q, n]."""
    scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1)


def _mask(
    texts: Texts, group: Group, tokens: slice, bias: Tensor | None, layer: Layer, first_only: bool
) -> Tensor | None:
    """What is added to attention scores [G or 1, H or 1, n or 1, n]: the logarithm of the keys' sizes (ToMe's
    proportional attention), and the family's position bias.
    """
    mask = None if texts.sizes is None else grouped(texts.sizes[tokens], group).log()[:, None, None]
    if bias is None:
        return mask
    own = bias if layer.bias_heads is None else bias[layer.bias_heads]
    at = grouped(texts.positions[tokens], group)
    rows = at[:, :1] if first_only else at
    biased = own[:, rows[:, :, None], at[:, None, :]].transpose(0, 1)
    return biased if mask is None else biased + mask


def _fed(layer: Layer, x: Tensor, context: Tensor | None) -> Tensor:
    """The stream after the layer, from the one before, which is overwritten, and the heads' outputs."""
    x = layer.attention_norm(_joined(x, layer.output, context))
    return cast(Tensor, layer.ffn_norm(_joined(x, layer.down, layer.hidden(x) if layer.num_neurons else None)))


def _joined(x: Tensor, projection: nn.Linear, values: Tensor | None) -> Tensor:
    """x plus a projection of values, None for those of a sub-layer that is gone; in the memory of `x` where no gradient
    needs that: the product is added as it is computed, and no matrix is filled with copies of the bias first.
    """
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or type(projection) is not nn.Linear
    if values is None:
        return x if projection.bias is None else x + projection.bias
    if plain:
        return x + cast(Tensor, projection(values))
    x.addmm_(values, projection.weight.t())
    return x if projection.bias is None else x.add_(projection.bias)
