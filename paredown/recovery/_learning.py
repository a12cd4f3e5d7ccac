"""Training by a number of steps or by the clock: checks on the way, the best state kept, checkpoints to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from paredown.recovery._checkpoint import Checkpoint, Progress, State
from paredown.recovery._zeros import Zeros

WARM_UP = 0.05  # share of the training
CHECKPOINT_SECONDS = 30.0
CHECKS = 10  # how often what is held out judges: so many times that the best state is near the best there was


def learn(
    trained: Mapping[str, Tensor],
    optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    losses: Callable[[int], Iterator[Tensor]],
    judge: Callable[[], float],
    task: str,
    minutes: float | None = None,
    steps: int | None = None,
    most_gradient: float = 1.0,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """The checks made on the way, the first of them before any step; `trained` is left in its best state.

    `losses(step)` gives the losses of one batch after the other, without an end, for a training that has done so many
    steps; `judge()` how far the present state is off, on what is not learnt from. Exactly one of `minutes` and `steps`.
    `optimizer_of` is asked for the optimizer of those of `trained` that require gradients; its rate is the peak of a
    warm-up and a half cosine. Gradients are cut at a norm of `most_gradient`, and matrices that have zeros keep them.
    With `checkpoint` the state is written there every 30 seconds, on Ctrl-C and at the end, and a later call of the
    same `task` goes on from it. With no time, or nothing to train, there is one check and no file.

    Raises FingerprintMismatch when the checkpoint is of another training, and ParedownError when it cannot be read or
    written.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("say how long to train: either steps or minutes")
    total = float(steps) if steps is not None else 60 * (minutes or 0.0)
    if total <= 0 or not trained:
        start = judge()
        return [Progress(0.0, 0, start, start)]
    zeros = Zeros(trained)
    learnt = [value for value in trained.values() if value.requires_grad]
    optimizer = optimizer_of(learnt)
    peaks = [group["lr"] for group in optimizer.param_groups]
    file = checkpoint and Checkpoint(checkpoint, trained, optimizer, task=task)
    state = file.restore() if file else None
    if state is None:
        start = judge()
        state = State(0.0, 0, (Progress(0.0, 0, start, start),), _copies(trained))
    step, history, best = state.step, list(state.history), state.best
    begun, saved = time.monotonic() - state.seconds, state.seconds
    batches = losses(step)

    def here() -> Progress:
        return replace(history[-1], seconds=time.monotonic() - begun, step=step)

    def share(at: Progress) -> float:
        """Of the training, what is done."""
        return (at.seconds if steps is None else at.step) / total

    def check() -> None:
        nonlocal best
        value = judge()
        better = value < history[-1].best
        best = _copies(trained) if better else best
        history.append(replace(here(), distance=value, best=value if better else history[-1].best))

    def save(seconds: float) -> None:
        if file:
            file.save(State(seconds, step, tuple(history), best))

    try:
        while (done := share(here())) < 1:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _rate(done)
            loss = next(batches)
            optimizer.zero_grad()
            loss.backward()
            if nn.utils.clip_grad_norm_(learnt, most_gradient).isfinite():  # else one bad batch would spoil all weights
                optimizer.step()
                zeros.keep()
            step += 1
            now = here()
            if share(now) - share(history[-1]) >= 1 / CHECKS - 1e-9:  # less what rounding takes from a tenth
                check()
            if report:
                report(replace(history[-1], seconds=now.seconds, step=step))
            if now.seconds - saved > CHECKPOINT_SECONDS:
                save(now.seconds)
                saved = now.seconds
        if history[-1].step < step:
            check()
    except KeyboardInterrupt:
        save(here().seconds)
        raise
    optimizer.zero_grad()
    save(max(total, state.seconds) if steps is None else here().seconds)  # the time is over, whatever the clock says
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(best[name])
    return history


def _rate(share: float) -> float:
    """Linear warm-up, then a half cosine down to zero, by the share of the training that is done."""
    return min(1.0, share / WARM_UP + 0.02) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _copies(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.items()}
