"""Training a cut image classifier: fine-tuning on labels, or distillation from the dense network, on pictures that are
shifted and mirrored at random.

Distillation is Hinton et al. 2015, arXiv:1503.02531, on mixtures of two pictures each, as a teacher says little of
pictures that it knows by heart (Beyer et al. 2022, arXiv:2106.05237), with hints from between the layers (Romero et al.
2015, arXiv:1412.6550). The shifts are those of He et al. 2016, section 4.2.

Legend: B pictures, C classes or channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown.cores import has_bfloat16
from paredown.errors import BadData
from paredown.graph import copied, in_training, run_seeing
from paredown.layers import layers_of, macs
from paredown.recovery._checkpoint import Progress
from paredown.recovery._learning import learn
from paredown.tasks.image_classification import ImageData, blended, normalized
from paredown.types import Array, GraphAnatomy, Plan

BATCH, SMALLEST_BATCH = 128, 16
MOST_VALUES = 2**30  # between the layers of a batch: four gigabytes in float32, which a training holds at once
RATE = 0.05  # of SGD with momentum, at its peak
RATE_ALONE = 0.01  # without hints, where 0.05 undid in twenty minutes the re-fit of cifar10-resnet56
DECAY = 5e-4
TEMPERATURE = 2.0
LEAST = 1e-6  # of a norm: what is dead in the teacher divides nothing by zero
HINTS = 1000.0  # weight of the relative squared error between the layers; of 10 to 1000 the best there
MOST_MIXED = 0.5  # of the other picture in a mixture
HELD, FEWEST_HELD = 1000, 100  # pictures, a tenth of all at most, that judge and are not learnt from
HELD_MACS = 2.5e11  # of a judgement, or that of the fewest: seconds on two cores

Hint = tuple[int, Tensor]  # the dimension of the channels, and which of the dense network's are left


def train_on_pictures(
    small: fx.GraphModule,
    *,
    teacher: fx.GraphModule,
    data: ImageData,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    anatomy: GraphAnatomy | None = None,
    plan: Plan | None = None,
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
    "distill" (the divergence from the teacher, on mixtures of pictures; no labels); the one is judged by cross-entropy,
    the other by the divergence on blended pictures. Given the `anatomy` of the teacher and the `plan` that `small` was
    cut by, a distillation also leads what layers read to what the teacher's read. `mirrored` pictures are as good as
    others, but for those of digits and the like. Where the CPU has bfloat16, products of the training are in it. With
    `checkpoint` the state is written there every 30 seconds, on Ctrl-C and at the end, and a later call goes on from
    it. The copy is never worse than `small` on the held-out pictures, and keeps the zeros of sparse weights.
    Raises BadData without pictures.
    """
    if len(data) < 2:
        raise BadData("There are no pictures to learn from.")
    student = copied(small)
    student.requires_grad_(True)
    _laid_out(student, torch.channels_last)  # a fifth faster on two cores, measured on cifar10-resnet20
    learning = in_training(student)
    teacher = copied(teacher)
    _laid_out(teacher, torch.channels_last)
    hints = _hints(small, teacher, anatomy, plan) if anatomy and plan and objective == "distill" else {}
    drawn = np.random.default_rng(seed).permutation(len(data))
    count = max(1, min(HELD, max(FEWEST_HELD, int(HELD_MACS / macs(small))), len(data) // 10))
    learnt = drawn[count:]
    batch = _batch(small)
    judged = _judge(teacher, data.take(drawn[:count]), batch, mean, std, objective)
    trained: dict[str, Tensor] = dict(student.named_parameters())
    trained |= {name: value for name, value in student.named_buffers() if value.is_floating_point()}

    def losses(step: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed + step)
        for chosen in _lessons(len(learnt), batch, seed=seed + step):
            rows = learnt[chosen]
            x = augmented(torch.from_numpy(normalized(data.pixels[rows], mean, std)), generator, mirrored=mirrored)
            if objective == "finetune":
                yield _missed(learning, x, torch.from_numpy(data.labels[rows]))
            else:
                yield _divergence(learning, teacher, mixed(x, generator), hints)

    history = learn(
        trained,
        partial(torch.optim.SGD, lr=RATE if hints else RATE_ALONE, momentum=0.9, weight_decay=DECAY, nesterov=True),
        losses=losses,
        judge=lambda: judged(student),
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


def mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, H, W], into each picture the next one mixed, up to a half of it (Zhang et al. 2018, arXiv:1710.09412)."""
    share = MOST_MIXED * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + share * (x.roll(1, 0) - x)


def _missed(student: fx.GraphModule, x: Tensor, labels: Tensor) -> Tensor:
    with _in_bfloat16():
        logits = student(x.contiguous(memory_format=torch.channels_last))
    return F.cross_entropy(logits.float(), labels)


def _divergence(student: fx.GraphModule, teacher: fx.GraphModule, x: Tensor, hints: Mapping[str, Hint]) -> Tensor:
    """From the teacher's answers, and of what the layers of `hints` read."""
    x = x.contiguous(memory_format=torch.channels_last)
    with _in_bfloat16():
        logits, ours = _seen(student, x, hints)
        with torch.no_grad():
            answers, theirs = _seen(teacher, x, hints)
    log_probabilities, wanted = (F.log_softmax(one.float() / TEMPERATURE, dim=1) for one in (logits, answers))
    loss = F.kl_div(log_probabilities, wanted, log_target=True, reduction="batchmean") * TEMPERATURE**2
    for name, (dim, stay) in hints.items():
        whole = theirs[name]
        whole = whole if whole.shape[dim] == len(stay) else whole.index_select(dim, stay)
        error, size = (torch.linalg.vector_norm(one, dtype=torch.float32) for one in (ours[name] - whole, whole))
        loss = loss + HINTS / len(hints) * (error / size.clamp_min(LEAST)).square()
    return loss


def _seen(model: fx.GraphModule, x: Tensor, layers: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's answer, and what these layers read on the way."""
    found: dict[str, Tensor] = {}

    def before(name: str, read: Tensor) -> Tensor:
        found[name] = read
        return read

    return run_seeing(model, x, layers, before), found


def _hints(small: fx.GraphModule, teacher: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> dict[str, Hint]:
    """Layers by node, each with those of the dense network's channels in its input that are left: layers that read what
    something else reads too, as the residual stream, and the last one. What is read inside a branch may differ: led
    there too, a student of cifar10-resnet56 came less near to the teacher's answers.
    """
    whole = {layer.node: layer for layer in layers_of(teacher)}
    nodes = {node.name: node for node in teacher.graph.nodes}
    found: dict[str, Hint] = {}
    seen = set[str]()
    layers = [layer for layer in layers_of(small) if layer.groups == 1]
    for layer in layers:
        read = nodes[whole[layer.node].x]
        if read.op != "placeholder" and read.name not in seen and (len(read.users) > 1 or layer is layers[-1]):
            seen.add(read.name)
            size = teacher.get_parameter(layer.weight).shape[1]
            stay = torch.from_numpy(anatomy.kept(plan, layer.weight, 1, size))
            found[layer.node] = -1 if layer.kind == "linear" else 1, stay
    return found


def _in_bfloat16() -> Any:
    """The context in which products are in bfloat16, where the CPU has it: of cifar10-resnet56 a step took 0.5 of the
    time, the dense network's answers 0.4.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def _judge(
    teacher: fx.GraphModule,
    data: ImageData,
    batch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    objective: str,
) -> Callable[[fx.GraphModule], float]:
    """What judges a network: its mean cross-entropy, or of a distillation the mean divergence from the teacher on
    blended pictures, which the teacher answers once.
    """
    tuning = objective == "finetune"

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(data), batch):
            pixels = normalized(data.pixels[start : start + batch], mean, std)
            x = torch.from_numpy(pixels if tuning else blended(pixels))
            yield x.contiguous(memory_format=torch.channels_last)

    with torch.inference_mode():
        known = None if tuning else torch.cat([F.log_softmax(teacher(x), dim=1) for x in batches()])

    def judged(model: fx.GraphModule) -> float:
        with torch.inference_mode():
            ours = torch.cat([F.log_softmax(model(x), dim=1) for x in batches()])
            if known is None:
                return float(F.nll_loss(ours, torch.from_numpy(data.labels)))
            return float(F.kl_div(ours, known, log_target=True, reduction="batchmean"))

    return judged


def _batch(model: fx.GraphModule) -> int:
    """How many pictures are learnt from at once: fewer where a network makes much of each."""
    shapes = [node.meta["shape"] for node in model.graph.nodes if node.op == "call_function"]
    values: int = sum(math.prod(shape[1:]) for shape in shapes if shape and isinstance(shape[0], int))
    return min(BATCH, max(SMALLEST_BATCH, MOST_VALUES // max(1, values)))


def _lessons(count: int, batch: int, *, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, max(1, count - batch + 1), batch):
            yield order[start : start + batch]
