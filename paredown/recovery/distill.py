"""Distillation from the dense model on texts without labels, by the clock, and resumable at any moment.

The teacher's outputs are computed once, before the clock starts; the student then learns them with AdamW. Dropout is
off (both models are deterministic) and the embeddings stay frozen: their gradient would cost more than the layers'.

Legend: N texts, B texts of a batch, C classes or embedding width.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.calibration import distance, evaluating, tensors
from paredown.encoder import Encoder, Model, copied
from paredown.errors import BadData
from paredown.recovery._checkpoint import Progress
from paredown.recovery._learning import learn
from paredown.tasks import Tokens, pad, similar_lengths
from paredown.types import Array, Layout

__all__ = ["Progress", "learning_rate", "recover", "teach"]

BATCH = 64
BATCH_TOKENS = 1536  # of a batch, padding included: autograd keeps every layer's activations
TAUGHT_TOKENS = 16_000  # that the teacher answers between two looks at the clock
LOGIT_WEIGHT = 0.05  # of the squared error of the logits: it still teaches where softmax is saturated
HELD_TOKENS = 12_000  # that judge: it must not take the time for learning


def learning_rate(layout: Layout) -> float:
    """The peak rate of AdamW: 4e-4 at width 384, less in proportion for wider models, at most 5e-4.

    Small students take three to ten times the rate of fine-tuning (TinyBERT, arXiv:1909.10351); under Adam the rate
    that is best falls as one over the width (Yang et al. 2022, arXiv:2203.03466).
    """
    return min(5e-4, 4e-4 * 384 / layout.width)


def teach(
    encoder: Encoder,
    tokens: Tokens,
    *,
    seconds: float = math.inf,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The dense model's outputs [N, C] float32, in the order of the texts.

    When the seconds are over, what is done so far comes back: the outputs of the first texts, or [0, 0] for none.
    """
    parts: list[Tensor] = []
    half = _half_precision_pays(encoder)
    begun = time.monotonic()
    most = math.inf if math.isinf(seconds) else TAUGHT_TOKENS
    number = np.floor(np.cumsum(tokens.lengths) / most)  # of the chunk, inside which texts of like length are batched
    chunks = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(number)) + 1)
    with torch.no_grad(), evaluating(encoder), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for chunk in chunks:
            if not len(chunk) or time.monotonic() - begun >= seconds:
                break
            batches = similar_lengths(tokens.lengths, chunk, batch_size=BATCH, most_tokens=BATCH_TOKENS)
            outputs: list[Tensor] = []
            for rows in batches:
                outputs.append(encoder(**_inputs(encoder, tokens, rows)).float())
                if progress:
                    progress(len(rows))
            parts.append(torch.cat(outputs)[torch.from_numpy(np.argsort(np.concatenate(batches)))])
    return torch.cat(parts) if parts else torch.empty(0, 0)


def recover(
    small: Model,
    *,
    layout: Layout,
    tokens: Tokens,
    wanted: Tensor,
    minutes: float,
    checkpoint: Path | None = None,
    extra_tokens: Tokens | None = None,
    extra_wanted: Tensor | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> tuple[Model, list[Progress]]:
    """A distilled copy of `small` (its best state on held-out texts) and the checks made on the way.

    `wanted` [N, C] are the teacher's outputs on `tokens`; the texts of `held_out` judge and are not learnt from.
    `extra_*` are further texts to learn from. With `checkpoint`, the state is written there every 30 seconds, on
    Ctrl-C and at the end, and a later call goes on from it. The copy is never worse than `small` on the held-out texts;
    it shares its embeddings with `small`, keeps the zeros of sparse matrices, and comes back frozen and in eval mode.
    With no minutes, or nothing to train, it is a plain copy and one check.

    Raises BadData without texts, FingerprintMismatch when the checkpoint is of another training, and ParedownError when
    it cannot be read or written.
    """
    count = len(tokens)
    if not count:
        raise BadData("There is no text to learn from.")
    if len(wanted) != count or (extra_tokens is None) != (extra_wanted is None):
        raise ValueError("every text needs the teacher's output: wanted for tokens, extra_wanted for extra_tokens")
    student = copied(small, layout).eval()
    encoder = Encoder(student, layout)
    held = held_out(tokens.lengths, seed=seed)
    learnt = np.setdiff1d(np.arange(count), held) if count > 1 else held
    judge = Tokens(tuple(tokens.ids[i] for i in held), tokens.pad_id, tokens.input_names, 0)
    judged = wanted[torch.from_numpy(held)]
    further = extra_tokens.ids if extra_tokens else ()
    lessons = Tokens(tuple(tokens.ids[i] for i in learnt) + further, tokens.pad_id, tokens.input_names, 0)
    targets = wanted[torch.from_numpy(learnt)]
    targets = targets if extra_wanted is None else torch.cat([targets, extra_wanted])

    trained = _trainable(student, layout)
    half = _half_precision_pays(encoder)

    def losses(step: int) -> Iterator[Tensor]:
        for rows in _lessons(lessons, seed=seed + step):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = encoder(**_inputs(encoder, lessons, rows)).float()
            yield _loss(output, targets[torch.from_numpy(rows)], encoder.output_name)

    history = learn(
        trained,
        partial(torch.optim.AdamW, lr=learning_rate(layout), weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        losses=losses,
        judge=lambda: _judge(encoder, judge, judged),
        task=f"distill {_digest(lessons)} seed {seed}",
        minutes=minutes,
        checkpoint=checkpoint,
        report=report,
    )
    return student.requires_grad_(False), history


def held_out(lengths: Array, *, seed: int = 0) -> Array:
    """Which texts judge: a tenth of them drawn at random, no more than 12,000 tokens, one text at least."""
    drawn: Array = np.random.default_rng(seed).permutation(len(lengths))[: max(1, len(lengths) // 10)]
    return drawn[: max(1, int(np.searchsorted(np.cumsum(lengths[drawn]), HELD_TOKENS, side="right")))]


def _digest(tokens: Tokens) -> str:
    """What tells one set of texts from another."""
    found = hashlib.sha256(tokens.lengths.tobytes())
    for ids in tokens.ids:
        found.update(ids.tobytes())
    return found.hexdigest()


def _loss(output: Tensor, wanted: Tensor, output_name: str) -> Tensor:
    """Scalar. Embeddings also keep the angles among the texts of a batch, which is what neighbours are made of."""
    loss = distance(output, wanted, output_name).mean()
    if output_name == "logits":
        return loss + LOGIT_WEIGHT * F.mse_loss(output, wanted)
    ours, theirs = F.normalize(output, dim=-1), F.normalize(wanted, dim=-1)
    return loss + F.mse_loss(ours @ ours.T, theirs @ theirs.T)


def _trainable(student: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    """The parameters to learn, which alone require gradients: all but embeddings, unused modules and empty tensors."""
    student.requires_grad_(True)
    for name in (*layout.embeddings, *layout.unused):
        if name in dict(student.named_modules()):  # a fold takes unused modules away
            student.get_submodule(name).requires_grad_(False)
    for value in student.parameters():
        if not value.numel():
            value.requires_grad_(False)
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def _inputs(encoder: Encoder, tokens: Tokens, rows: Array) -> dict[str, Tensor]:
    ids = [tokens.ids[i] for i in rows]
    return tensors(pad(ids, pad_id=tokens.pad_id, input_names=tokens.input_names), encoder)


def _lessons(tokens: Tokens, *, seed: int) -> Iterator[Array]:
    """Endless batches of indices: shuffled, but alike in length within a batch, so that little is padding."""
    rng = np.random.default_rng(seed)
    lengths = tokens.lengths
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), BATCH * 40):
            chunk = order[start : start + BATCH * 40]
            parts = similar_lengths(lengths, chunk, batch_size=BATCH, most_tokens=BATCH_TOKENS)
            for i in rng.permutation(len(parts)):
                yield parts[i]


def _judge(encoder: Encoder, tokens: Tokens, wanted: Tensor) -> float:
    """Mean divergence from the teacher on the held-out texts, in full precision."""
    total = 0.0
    with torch.inference_mode():
        texts = np.arange(len(tokens))
        for rows in similar_lengths(tokens.lengths, texts, batch_size=BATCH, most_tokens=BATCH_TOKENS):
            output = encoder(**_inputs(encoder, tokens, rows))
            total += float(distance(output, wanted[torch.from_numpy(rows)], encoder.output_name).sum())
    return total / len(tokens)


def _half_precision_pays(encoder: Encoder) -> bool:
    """Whether bfloat16 matrix products are faster here: timed on the model's own FFN, since flags alone mislead."""
    layer = next((layer for layer in encoder.layers if layer.num_neurons), None)
    if layer is None:
        return False
    width = layer.up.weight.shape[1]
    x = torch.linspace(-2, 2, BATCH * 16 * width, dtype=layer.up.weight.dtype).view(BATCH, 16, width)
    seconds: dict[bool, float] = {}
    for half in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            runs = []
            for _ in range(7):
                begun = time.perf_counter()
                layer.ffn_output(x)
                runs.append(time.perf_counter() - begun)
        seconds[half] = float(np.median(runs[2:]))
    return seconds[True] < 0.8 * seconds[False]
