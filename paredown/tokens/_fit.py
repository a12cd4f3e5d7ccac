"""What a policy learns from texts, in closed form and without labels: the gates of the learned scorer, the linear exit.

Legend: B texts, T tokens of a padded batch, D model width, H heads, K head size, X gate features, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from paredown import registry
from paredown.calibration import Batch, evaluating, probe_loss, ridge_regression, tensors, with_ones
from paredown.encoder import Encoder, Layer
from paredown.errors import BadData
from paredown.tokens._packed import Packed
from paredown.tokens._texts import Texts
from paredown.types import TokenPolicy, TokenStage

PROBES = 2  # drawn answers per text: four on a third of the texts made a worse gate
GATE_RIDGE, EXIT_RIDGE = 1e-2, 1e-3  # in shares of the mean square of a feature
LEAST = 1e-12  # of a sensitivity, before its logarithm


def fit(
    encoder: Encoder,
    policy: TokenPolicy,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The tensors that the policy needs on this model, as `Packed` takes them; none for most policies.

    `progress` is told of texts as they are done. Raises BadData where texts are needed and there are none.
    """
    stages = policy.stages
    gated = "gate" in registry.find("tokens", policy.scorer).NEEDS and policy.action == "drop"
    if stages and (gated or policy.exit) and not len(batches):
        raise BadData("this token policy is fitted to texts, and there are none")
    found: dict[str, Tensor] = {}
    if stages and gated:
        found |= fit_gates(encoder, [stage.after for stage in stages], batches, seed=seed, progress=progress)
    if stages and policy.exit:
        found |= fit_exit(encoder, policy, found, batches)
    return found


def fit_gates(
    encoder: Encoder,
    afters: Sequence[int],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """`gate.<after>` [D]: the linear function of a token's state that best tells how much the answer hangs on it.

    A gate m on each token of a text multiplies its share of all attention, and of the mean over tokens, from a layer
    on. The divergence from the dense model grows with (1 - m)^2 times the diagonal of its Gauss-Newton matrix, which
    two backward passes from drawn answers estimate for every token at once (`calibration.probe_loss`). The gate is the
    ridge regression of that diagonal's logarithm on the state, both about their mean over the text, special tokens not
    excepted. Cost: a forward pass and `PROBES` backward passes from the layer of the first gate on.
    """
    width = encoder.layout.width
    sums = {after: (torch.zeros(width, width).double(), torch.zeros(width, 1).double()) for after in afters}
    random = np.random.default_rng(seed)
    with evaluating(encoder.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            states, sensitivities = _sensitivities(encoder, inputs, sorted(afters), random)
            real = inputs["attention_mask"].bool()
            for after in afters:
                x, goal = _centred(states[after], real), _centred(sensitivities[after][:, :, None], real)
                gram, cross = sums[after]
                gram += (x.T @ x).double()
                cross += (x.T @ goal).double()
            if progress:
                progress(len(real))
    return {
        f"gate.{after}": ridge_regression(gram, cross, torch.zeros_like(cross), ridge=GATE_RIDGE, biased=False)[:, 0]
        .float()
        .contiguous()
        for after, (gram, cross) in sums.items()
    }


def _sensitivities(
    encoder: Encoder, inputs: Mapping[str, Tensor], afters: Sequence[int], random: np.random.Generator
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By layer: the stream behind it [B, T, D], and for each token the logarithm of how much the answer hangs on it."""
    real = inputs["attention_mask"].to(torch.float32)
    states, gates = {}, {}
    with torch.no_grad():
        x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
        mask = encoder.mask(x, inputs["attention_mask"])
        for index in range(afters[0]):
            x = _whole(encoder.layers[index], x, mask, torch.ones_like(real))
    with torch.enable_grad():
        open_ = torch.ones_like(real)
        for index in range(afters[0], len(encoder.layers)):
            if index in afters:
                states[index] = x.detach()
                gates[index] = torch.ones_like(real, requires_grad=True)
                open_ = open_ * gates[index]
            x = _whole(encoder.layers[index], x, mask, open_)
        weight = (open_ * real)[:, :, None]
        pooled = x[:, :1] if encoder.layout.pooling == "cls" else (x * weight).sum(1, True) / weight.sum(1, True)
        output = encoder.finish(pooled)
        total = {after: torch.zeros_like(real) for after in gates}
        for probe in range(PROBES):
            loss = probe_loss(encoder, output, random)
            found = torch.autograd.grad(loss, list(gates.values()), retain_graph=probe + 1 < PROBES)
            for after, g in zip(gates, found, strict=True):
                total[after] += g.square() / PROBES
    return states, {after: one.clamp(min=LEAST).log() for after, one in total.items()}


def _whole(layer: Layer, x: Tensor, mask: Tensor, gate: Tensor) -> Tensor:
    """The stream behind a layer, all rows of it, where a token's share of the attention is multiplied by its gate."""
    context = None
    if layer.num_heads:
        attention = layer.probabilities(x, mask) * gate[:, None, None]
        values = layer.value(x).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        context = ((attention / attention.sum(-1, keepdim=True)) @ values).transpose(1, 2).flatten(2)
    return layer.feed(layer.join_attention(x, layer.attended(context, x)))


def _centred(values: Tensor, real: Tensor) -> Tensor:
    """[B, T, X] -> [N, X]: without padding, about the mean over each text."""
    weight = real[:, :, None].to(values.dtype)
    return (values - (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True))[real]


def fit_exit(
    encoder: Encoder, policy: TokenPolicy, gates: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """`exit.<after>.weight` [D, D] and `.bias` [D] of every stage: the least-squares map from where a token was when it
    was dropped to where the dense model's last layer takes it, over the tokens that the policy drops.
    """
    sums: dict[int, list[Tensor]] = {}
    final = torch.empty(0)

    def see(stage: TokenStage, texts: Texts, keep: Sequence[Tensor]) -> None:
        dropped = ~torch.cat([mask.flatten() for mask in keep])
        if not dropped.any():
            return
        x = with_ones(texts.x[dropped])
        goal = final[texts.owners()[dropped], texts.positions[dropped]]
        before = sums.get(stage.after, [torch.zeros(()), torch.zeros(())])
        sums[stage.after] = [before[0] + (x.T @ x).double(), before[1] + (x.T @ goal).double()]

    packed = Packed(encoder, replace(policy, exit=False), gates, observer=see)
    with torch.no_grad(), evaluating(encoder.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            final = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
            mask = encoder.mask(final, inputs["attention_mask"])
            for index in range(len(encoder.layers)):
                final = encoder.step(index, final, mask)
            packed(**inputs)
    found: dict[str, Tensor] = {}
    for stage in policy.stages:
        if stage.after not in sums:
            raise BadData("the linear exit cannot be fitted: none of the texts is so long that it loses a token")
    for after, (gram, cross) in sums.items():
        solved = ridge_regression(gram, cross, torch.zeros_like(cross), ridge=EXIT_RIDGE).float()
        found |= {f"exit.{after}.weight": solved[:-1].contiguous(), f"exit.{after}.bias": solved[-1].contiguous()}
    return found
