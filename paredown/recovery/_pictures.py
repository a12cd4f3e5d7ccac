"""Training a cut image classifier: fine-tuning on labels, or distillation from the dense network, on pictures that are
shifted and mirrored at random.

Distillation is Hinton et al. 2015, arXiv:1503.02531; the shifts are those of He et al. 2016, section 4.2.

Legend: B pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown.errors import BadData
from paredown.graph import copied, in_training
from paredown.recovery._checkpoint import Progress
from paredown.recovery._learning import learn
from paredown.tasks.image_classification import ImageData, blended, normalized
from paredown.types import Array

BATCH = 128
RATE = 0.01  # of SGD with momentum, at its peak: at 0.05 twenty minutes undid the re-fit of cifar10-resnet56
DECAY = 5e-4
TEMPERATURE = 2.0
HELD = 1000  # pictures at most, a tenth of all, that judge and are not learnt from


def train_on_pictures(
    small: fx.GraphModule,
    *,
    teacher: fx.GraphModule,
    data: ImageData,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    minutes: float | None = None,
    steps: int | None = None,
    objective: str = "distill",
    mirrored: bool = True,
    checkpoint: Path | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> tuple[fx.GraphModule, list[Progress]]:
    """A trained copy of `small` (its best state on held-out pictures) and the checks made on the way, in nats.

    Exactly one of `minutes` and `steps` says how long. `objective` is "finetune" (cross-entropy of the labels) or
    "distill" (half of it, and half the divergence from the teacher); the one is judged by cross-entropy, the other by
    the divergence from the teacher on blended pictures. `mirrored` pictures are as good as others, but for those of
    digits and the like. With `checkpoint` the state is written there every 30 seconds, on Ctrl-C and at the end, and a
    later call goes on from it. The copy is never worse than `small` on the held-out pictures, and keeps the zeros of
    sparse weights. Raises BadData without pictures.
    """
    if len(data) < 2:
        raise BadData("There are no pictures to learn from.")
    student = copied(small)
    student.requires_grad_(True)
    _laid_out(student, torch.channels_last)  # a fifth faster on two cores, measured on cifar10-resnet20
    learning = in_training(student)
    drawn = np.random.default_rng(seed).permutation(len(data))
    count = max(1, min(HELD, len(data) // 10))
    judge, learnt = data.take(drawn[:count]), drawn[count:]
    trained: dict[str, Tensor] = dict(student.named_parameters())
    trained |= {name: value for name, value in student.named_buffers() if value.is_floating_point()}

    def losses(step: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed + step)
        for chosen in _lessons(len(learnt), seed=seed + step):
            rows = learnt[chosen]
            x = augmented(torch.from_numpy(normalized(data.pixels[rows], mean, std)), generator, mirrored=mirrored)
            x = x.contiguous(memory_format=torch.channels_last)
            yield _loss(learning, teacher, x, torch.from_numpy(data.labels[rows]), objective)

    history = learn(
        trained,
        partial(torch.optim.SGD, lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True),
        losses=losses,
        judge=lambda: _judge(student, teacher, judge, mean, std, objective),
        task=f"{objective} {len(data)} pictures {minutes} minutes {steps} steps seed {seed} mirrored {mirrored}",
        minutes=minutes,
        steps=steps,
        most_gradient=5.0,
        checkpoint=checkpoint,
        report=report,
    )
    _laid_out(student, torch.contiguous_format)
    return student.requires_grad_(False), history


def _laid_out(model: fx.GraphModule, form: torch.memory_format) -> None:
    """The weights of convolutions in another order of memory, in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=form)


def augmented(x: Tensor, generator: torch.Generator, *, mirrored: bool = True) -> Tensor:
    """[B, 3, H, W], each picture shifted by up to an eighth of its size (what comes in is zero) and mirrored or not."""
    count, _, height, width = x.shape
    many = torch.tensor([height // 8, width // 8])
    shift = (torch.rand(count, 2, generator=generator) * (2 * many + 1)).long() - many
    rows = torch.arange(height)[None] + shift[:, :1]
    columns = torch.arange(width)[None] + shift[:, 1:]
    if mirrored:
        turned = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(turned, width - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    at = (rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]).flatten(1)
    moved = x.flatten(2).gather(2, at[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return moved * inside


def _loss(student: fx.GraphModule, teacher: fx.GraphModule, x: Tensor, labels: Tensor, objective: str) -> Tensor:
    logits = student(x)
    loss = F.cross_entropy(logits, labels)
    if objective == "finetune":
        return loss
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x) / TEMPERATURE, dim=1)
    ours = F.log_softmax(logits / TEMPERATURE, dim=1)
    divergence = F.kl_div(ours, wanted, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return 0.5 * loss + 0.5 * divergence


def _judge(
    model: fx.GraphModule,
    teacher: fx.GraphModule,
    data: ImageData,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    objective: str,
) -> float:
    """Mean cross-entropy, or of a distillation the mean divergence from the teacher on blended pictures."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(data), BATCH):
            part = data.take(np.arange(start, min(start + BATCH, len(data))))
            pixels = normalized(part.pixels, mean, std)
            if objective == "finetune":
                labels = torch.from_numpy(part.labels)
                total += float(F.cross_entropy(model(torch.from_numpy(pixels)), labels, reduction="sum"))
            else:
                x = torch.from_numpy(blended(pixels))
                ours, wanted = (F.log_softmax(one(x), dim=1) for one in (model, teacher))
                total += float(F.kl_div(ours, wanted, log_target=True, reduction="sum"))
    return total / len(data)


def _lessons(count: int, *, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, max(1, count - BATCH + 1), BATCH):
            yield order[start : start + BATCH]
