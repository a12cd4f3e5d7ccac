"""Distillation from the dense model on texts without labels, by the clock, and resumable at any moment.

The teacher's outputs are computed once, before the clock starts; the student then learns them with AdamW. Dropout is
off (both models are deterministic) and the embeddings stay frozen: their gradient would cost more than the layers'.

Legend: N texts, B texts of a batch, C classes or embedding width.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paredown.calibration import distance, tensors
from paredown.encoder import Encoder
from paredown.tasks import Tokens, pad
from paredown.types import Array, Layout

Model = TypeVar("Model", bound=nn.Module)

BATCH = 64
LEARNING_RATE = 3e-4  # small students take three to ten times the rate of fine-tuning (TinyBERT, arXiv:1909.10351)
WARM_UP = 0.05  # share of the time
LOGIT_WEIGHT = 0.05  # of the squared error of the logits: it still teaches where softmax is saturated
CHECKPOINT_SECONDS = 30.0
CHECKS = 10  # how often the held-out texts judge the student


@dataclass(frozen=True)
class Progress:
    """Where a distillation stands: seconds spent, steps done, held-out divergence of the latest check and the best."""

    seconds: float
    step: int
    distance: float
    best: float


def teach(encoder: Encoder, tokens: Tokens, *, progress: Callable[[int], None] | None = None) -> Tensor:
    """The dense model's outputs [N, C] float32, in the order of the texts."""
    outputs: list[Tensor | None] = [None] * len(tokens.ids)
    order = np.argsort([len(one) for one in tokens.ids], kind="stable")
    half = _half_precision_pays(encoder)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            out = encoder(**_inputs(encoder, tokens, rows)).float()
            for row, value in zip(rows, out, strict=True):
                outputs[row] = value
            if progress:
                progress(len(rows))
    return torch.stack([value for value in outputs if value is not None])


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

    `wanted` [N, C] are the teacher's outputs on `tokens`; a tenth of those texts (512 at most) is held out to judge.
    `extra_*` are further texts to learn from. With `checkpoint`, the state is written there every 30 seconds and on
    Ctrl-C, and a later call goes on from it. The copy is never worse than `small` on the held-out texts.
    """
    student = copy.deepcopy(small)
    encoder = Encoder(student, layout)
    trained = _trainable(student, layout)
    rng = np.random.default_rng(seed)
    held = rng.permutation(len(tokens.ids))[: min(512, max(1, len(tokens.ids) // 10))]
    learn = np.setdiff1d(np.arange(len(tokens.ids)), held)
    judge = Tokens(tuple(tokens.ids[i] for i in held), tokens.pad_id, tokens.input_names, 0)
    judged = wanted[torch.from_numpy(held)]
    pool = tuple(tokens.ids[i] for i in learn) + (extra_tokens.ids if extra_tokens else ())
    lessons = Tokens(pool, tokens.pad_id, tokens.input_names, 0)
    targets = wanted[torch.from_numpy(learn)]
    targets = targets if extra_wanted is None else torch.cat([targets, extra_wanted])

    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    state = _Checkpoint(checkpoint, trained, optimizer)
    spent, step, history = state.restore()
    best = {name: value.detach().clone() for name, value in trained.items()} if not state.best else state.best
    if not history:
        start = _judge(encoder, judge, judged)
        history = [Progress(0.0, 0, start, start)]
    half = _half_precision_pays(encoder)
    total = minutes * 60
    next_check = spent + total / CHECKS
    begun = saved = time.monotonic() - spent
    batches = _lessons(lessons, seed=seed + step)
    try:
        while (now := time.monotonic() - begun) < total:
            rows = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _rate(now / total)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = encoder(**_inputs(encoder, lessons, rows)).float()
            loss = _loss(output, targets[torch.from_numpy(rows)], encoder.output_name)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            step += 1
            now = time.monotonic() - begun
            if now >= next_check or now >= total:
                next_check += total / CHECKS
                value = _judge(encoder, judge, judged)
                if value <= min(p.best for p in history):
                    best = {name: tensor.detach().clone() for name, tensor in trained.items()}
                history.append(Progress(now, step, value, min(value, history[-1].best)))
            if report:
                report(Progress(now, step, history[-1].distance, history[-1].best))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                state.save(now, step, history, best)
    except KeyboardInterrupt:
        state.save(time.monotonic() - begun, step, history, best)
        raise
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(best[name])
    state.save(max(total, spent), step, history, best)
    return student.requires_grad_(False).eval(), history


def _loss(output: Tensor, wanted: Tensor, output_name: str) -> Tensor:
    """Scalar. Embeddings also keep the angles among the texts of a batch, which is what neighbours are made of."""
    loss = distance(output, wanted, output_name).mean()
    if output_name == "logits":
        return loss + LOGIT_WEIGHT * F.mse_loss(output, wanted)
    ours, theirs = F.normalize(output, dim=-1), F.normalize(wanted, dim=-1)
    return loss + F.mse_loss(ours @ ours.T, theirs @ theirs.T)


def _rate(share: float) -> float:
    """Linear warm-up, then a half cosine down to zero, by the share of the time that has passed."""
    return min(1.0, share / WARM_UP + 0.02) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _trainable(student: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    student.requires_grad_(True)
    for name in layout.embeddings:
        student.get_submodule(name).requires_grad_(False)
    for name in layout.unused:
        student.get_submodule(name).requires_grad_(False)
    return {name: value for name, value in student.named_parameters() if value.requires_grad and value.numel()}


def _inputs(encoder: Encoder, tokens: Tokens, rows: Array) -> dict[str, Tensor]:
    ids = [tokens.ids[i] for i in rows]
    return tensors(pad(ids, pad_id=tokens.pad_id, input_names=tokens.input_names), encoder)


def _lessons(tokens: Tokens, *, seed: int) -> Iterator[Array]:
    """Endless batches of indices: shuffled, but alike in length within a batch, so that little is padding."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray([len(one) for one in tokens.ids])
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), BATCH * 40):
            chunk = order[start : start + BATCH * 40]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            parts = [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
            for i in rng.permutation(len(parts)):
                yield parts[i]


def _judge(encoder: Encoder, tokens: Tokens, wanted: Tensor) -> float:
    """Mean divergence from the teacher on the held-out texts, in full precision."""
    total = 0.0
    order = np.argsort([len(one) for one in tokens.ids], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            output = encoder(**_inputs(encoder, tokens, rows))
            total += float(distance(output, wanted[torch.from_numpy(rows)], encoder.output_name).sum())
    return total / len(order)


def _half_precision_pays(encoder: Encoder) -> bool:
    """Whether bfloat16 matrix products are faster here: timed on the model's own FFN, since flags alone mislead."""
    layer = next((layer for layer in encoder.layers if layer.num_neurons), None)
    if layer is None:
        return False
    x = torch.randn(BATCH, 16, layer.up.weight.shape[1])
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


class _Checkpoint:
    """The state of a distillation on disk: one safetensors file that appears whole or not at all."""

    def __init__(self, path: Path | None, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer):
        self.path, self.trained, self.optimizer = path, trained, optimizer
        self.best: dict[str, Tensor] = {}

    def save(self, seconds: float, step: int, history: list[Progress], best: dict[str, Tensor]) -> None:
        if self.path is None:
            return
        tensors_: dict[str, Tensor] = {}
        for name, value in self.trained.items():
            tensors_[f"now.{name}"] = value.detach()
            tensors_[f"best.{name}"] = best[name]
            for key, moment in self.optimizer.state.get(value, {}).items():
                tensors_[f"{key}.{name}"] = moment.reshape(-1) if key == "step" else moment
        notes = {"seconds": str(seconds), "step": str(step), "history": json.dumps([asdict(p) for p in history])}
        beside = self.path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in tensors_.items()}, beside, metadata=notes)
        os.replace(beside, self.path)

    def restore(self) -> tuple[float, int, list[Progress]]:
        """Seconds spent, steps done and the checks so far; zeros when there is nothing to go on from."""
        if self.path is None or not self.path.exists():
            return 0.0, 0, []
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            notes = file.metadata()
        stored = load_file(self.path)
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(stored[f"now.{name}"])
                self.best[name] = stored[f"best.{name}"]
                moments = {key: stored[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq") if f"{key}.{name}" in stored}
                if moments:
                    self.optimizer.state[value] = {**moments, "step": stored[f"step.{name}"].reshape(())}
        history = [Progress(**one) for one in json.loads(notes["history"])]
        return float(notes["seconds"]), int(notes["step"]), history
