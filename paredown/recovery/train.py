"""Fine-tuning and distillation on transformers' Trainer, so that it runs unchanged on many GPUs (torchrun, accelerate).

Cosine schedule with 10 % warm-up, early stopping on held-out texts, best state kept, bfloat16 where there is a GPU that
has it, checkpoints to go on from; LoRA by peft as an option. `distill` is the quicker loop for text encoders on a CPU.
Started by torchrun or `accelerate launch`, the processes share the batches and all end with the same weights.

Legend: N texts, B texts of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paredown.encoder import Model, copied
from paredown.errors import BadData, FingerprintMismatch, MissingExtra, ParedownError
from paredown.files import replacing
from paredown.models import silenced
from paredown.network import network
from paredown.recovery import _losses as losses
from paredown.recovery._trainer import expected_warnings, own_random_state, read_notes, remember, usual
from paredown.recovery._zeros import Zeros
from paredown.recovery.distill import Progress, held_out
from paredown.tasks import Tokens, pad, similar_lengths
from paredown.tasks.causal_lm import next_tokens
from paredown.types import Array, Layout, Plan, canonical_json

OBJECTIVES = ("distill", "finetune")
CHECKS = 10  # of the held-out loss in a training, and as many checkpoints
TIMED_STEPS = 4  # by which steps are made out of minutes; the first is left out
MOST_STEPS = 1_000_000
BATCH = 64  # texts at most
BEST = "best.safetensors"  # what a training that is over has learnt


@dataclass(frozen=True)
class Recipe:
    """How a student is trained; `recipe` gives the defaults of a kind of model."""

    objective: str
    learning_rate: float
    batch_tokens: int
    temperature: float = 2.0
    hidden_weight: float = 1.0
    relation_weight: float = 0.0
    task_weight: float = 0.0
    lora_rank: int = 0
    weight_decay: float = 0.01
    patience: int = 3  # checks without a better loss end a training


def recipe(layout: Layout, *, objective: str = "distill", lora_rank: int = 0) -> Recipe:
    """The defaults for a model, with their reasons.

    Learning rate: a cut model is far from a minimum and small, so it takes more than the 2e-5 of fine-tuning a whole
    one: 2e-4 for text encoders, half of that with labels alone, which are few and soon learnt by heart; 1e-3 for a
    language model, whose every token teaches. LoRA's fresh matrices take five times as much. Batch: 2,048 tokens, as
    much as scoring holds. Streams are learnt beside the answers where the last layer gives every token: they say where
    it went wrong. Values' relations and labels are off: both copy less than the answers do.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose {' or '.join(OBJECTIVES)}")
    generates = layout.pooling == "tokens"
    rate = 1e-3 if generates else 2e-4 if objective == "distill" else 1e-4
    return Recipe(
        objective=objective,
        learning_rate=rate * (5 if lora_rank else 1),
        batch_tokens=2048,
        lora_rank=lora_rank,
    )


def recover(
    small: Model,
    *,
    teacher: nn.Module,
    layout: Layout,
    plan: Plan,
    tokens: Tokens,
    recipe: Recipe,
    labels: Array | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    folder: Path | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> tuple[Model, list[Progress]]:
    """A trained copy of `small` (its best state on held-out texts), and the checks made on the way.

    `plan` cut `small` out of `teacher`. A tenth of the texts, one at least, judges and is not learnt from. Exactly one
    of `steps` and `minutes`; minutes become steps by timing a few, so that the schedule ends with them. Without
    `labels` [N] a classifier can only be distilled; a language model learns its next tokens. With `folder`, checkpoints
    are written there, and a later call goes on from the last whole one: safetensors for the weights, Trainer's own
    files for the optimizer. Embeddings are frozen: their gradient and their optimizer state would cost more than the
    layers'. The copy is never worse than `small` on the held-out texts, keeps the zeros of sparse matrices, and comes
    back frozen and in eval mode.

    Raises BadData without texts or labels to learn, FingerprintMismatch when the folder is of another training,
    MissingExtra without accelerate, or peft for LoRA.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("say how long to train: either steps or minutes")
    count = len(tokens)
    if not count:
        raise BadData("There are no texts to learn from.")
    generates = layout.pooling == "tokens"
    if recipe.objective == "finetune" and labels is None and not generates:
        raise BadData("Fine-tuning needs labels, and the data has none: distil instead.")
    student = copied(small, layout)
    held = held_out(tokens.lengths, seed=seed)
    learnt = np.setdiff1d(np.arange(count), held)
    data = _Texts(tokens, labels, layout, recipe.batch_tokens)
    together = _processes()
    with own_random_state(), silenced(), expected_warnings():
        layers = {name: value for name, value in student.named_parameters() if name.startswith(layout.layers)}
        zeros = Zeros(layers)  # before LoRA, whose own matrices begin at zero
        lesson = _Lesson(student, teacher, layout, plan, recipe).to(together.device)
        if recipe.lora_rank and zeros.held:
            raise ParedownError("LoRA's matrices would fill the zeros of a sparse model: train it without LoRA.")
        trained = _trainable(lesson, layout, recipe)
        clock = time.perf_counter()
        begun = _judge(lesson, data, held)
        judging = time.perf_counter() - clock
        history = [Progress(0.0, 0, begun, begun)]
        if not trained or not len(learnt) or not (steps or minutes):
            return student.requires_grad_(False).eval(), history
        before = {name: value.detach().clone() for name, value in trained.items()}
        with contextlib.ExitStack() as stack:
            if folder is None and together.is_main_process:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            place = Path(_agreed(folder))
            job = [asdict(recipe), _digest(tokens, labels), seed, steps, minutes, plan.id]
            stored = _agreed(_job(place, job) if together.is_main_process else None)
            if steps is None:
                known = stored.get("steps")
                steps = (
                    int(known) if known else _affordable(lesson, data, learnt, 60 * (minutes or 0) - CHECKS * judging)
                )
                steps = int(_agreed(steps))
            done = place / BEST
            if _agreed(done.exists()):
                history += [Progress(**one) for one in stored["checks"]]
                _put(trained, load_file(done))
            else:
                if together.is_main_process:
                    remember(place, {**stored, "steps": steps})
                history += _fit(lesson, data, learnt, held, recipe, steps, place, seed, report, begun, zeros)
                if together.is_main_process:
                    remember(place, {**read_notes(place), "checks": [asdict(one) for one in history[1:]]})
                    with replacing(done) as beside:
                        save_file({key: value.detach().contiguous() for key, value in trained.items()}, beside)
            together.wait_for_everyone()
        if history[-1].best >= begun:
            _put(trained, before)
        where = next(small.parameters()).device
        teacher.to(where)
        model = lesson.merged().to(where)
    return cast(Model, model.requires_grad_(False).eval()), history


def _processes() -> Any:
    """Accelerate's state of the processes that train together: this one alone, unless a launcher started more."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtra("accelerate", "train") from error
    return PartialState(cpu=not torch.cuda.is_available())


def _agreed(value: Any) -> Any:
    """The first process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _put(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(values[name])


class _Lesson(nn.Module):
    """The student with its loss, as Trainer wants it: inputs in, a loss out. The teacher is no part of its state."""

    _keys_to_ignore_on_save = None  # Trainer reads it where a state dict lacks parameters

    def __init__(self, student: nn.Module, teacher: nn.Module, layout: Layout, plan: Plan, recipe: Recipe):
        super().__init__()
        self.student = _with_lora(student, layout, recipe.lora_rank) if recipe.lora_rank else student
        self.layout, self.recipe, self.layers = layout, recipe, plan.keep["layers"]
        self._teacher = [network(teacher, layout)]  # in a list, so that it is not registered

    def train(self, mode: bool = True) -> _Lesson:
        """Stays in eval mode: dropout would make teacher and student differ for no reason."""
        super().train(False)
        return self

    def state_dict(self, *arguments: Any, **more: Any) -> Any:
        """What is learnt, and nothing else: a checkpoint need not hold frozen embeddings, which may be tied."""
        learnt = {name for name, value in self.named_parameters() if value.requires_grad}
        return {name: value for name, value in super().state_dict(*arguments, **more).items() if name in learnt}

    @property
    def own(self) -> nn.Module:
        """The student's own model, whatever LoRA has put around it."""
        return cast(Any, self.student).get_base_model() if self.recipe.lora_rank else self.student

    def merged(self) -> nn.Module:
        return cast(Any, self.student).merge_and_unload() if self.recipe.lora_rank else self.student

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        targets: Tensor | None = None,
        return_loss: bool = True,  # by this name Trainer knows that evaluation gives a loss
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        ours, how = network(self.own, self.layout), self.recipe
        distils = how.objective == "distill"
        seen = losses.watched(ours, inputs, values=distils and how.relation_weight > 0)
        loss = seen.output.new_zeros((), dtype=torch.float32)
        if distils:
            with torch.no_grad():
                teacher = self._teacher[0]
                teacher.model.to(input_ids.device)
                shown = losses.watched(teacher, inputs, values=how.relation_weight > 0)
            loss = loss + losses.answers(seen.output, shown.output, ours.output_name, how.temperature)
            if how.hidden_weight:
                loss = loss + how.hidden_weight * losses.hidden(seen, shown, self.layers, attention_mask)
            if how.relation_weight:
                loss = loss + how.relation_weight * losses.relations(seen, shown, attention_mask)
        weight = how.task_weight if distils else 1.0
        if weight and targets is not None:
            flat = targets[attention_mask.bool()] if targets.dim() == 2 else targets
            loss = loss + weight * losses.task(seen.output, flat)
        return {"loss": loss}


def _with_lora(student: nn.Module, layout: Layout, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    blocks = student.get_submodule(layout.layers)
    names = [
        f"{layout.layers}.{name}"
        for name, module in blocks.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and cast(Tensor, module.weight).dim() == 2
        if cast(Tensor, module.weight).numel() and not isinstance(module, nn.Embedding)
    ]
    transposed = any(not isinstance(student.get_submodule(name), nn.Linear) for name in names)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
    return cast(nn.Module, get_peft_model(cast(Any, student), config))


def _trainable(lesson: _Lesson, layout: Layout, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters to learn, which alone require gradients: LoRA's, or all but embeddings and empty tensors."""
    if not recipe.lora_rank:
        lesson.student.requires_grad_(True)
        modules = dict(lesson.student.named_modules())
        for name in (*layout.embeddings, *layout.unused):
            if name in modules:
                modules[name].requires_grad_(False)
        for value in lesson.student.parameters():
            if not value.numel():
                value.requires_grad_(False)
    return {name: value for name, value in lesson.named_parameters() if value.requires_grad}


@dataclass(frozen=True)
class _Texts:
    """Texts as batches of tensors. Trainer is given lists of indices, a batch each."""

    tokens: Tokens
    labels: Array | None
    layout: Layout
    batch_tokens: int

    def batches(self, chosen: Array) -> list[Array]:
        return similar_lengths(self.tokens.lengths, chosen, batch_size=BATCH, most_tokens=self.batch_tokens)

    def batch(self, rows: Array, where: torch.device | None = None) -> dict[str, Tensor]:
        arrays = pad([self.tokens.ids[i] for i in rows], pad_id=self.tokens.pad_id, input_names=self.tokens.input_names)
        found = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if self.layout.pooling == "tokens":
            targets = np.full(arrays["input_ids"].shape, -100, dtype=np.int64)
            targets[arrays["attention_mask"].astype(bool)] = next_tokens(arrays)
            found["targets"] = torch.from_numpy(targets)
        elif self.labels is not None:
            found["targets"] = torch.from_numpy(self.labels[rows])
        return found if where is None else {name: value.to(where) for name, value in found.items()}


class _Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One whole batch per item, shuffled anew in every round through the texts."""

    def __init__(self, data: _Texts, chosen: Array, *, rounds: int, seed: int | None):
        self.data = data
        rng = np.random.default_rng(seed)
        self.rows: list[Array] = []
        for _ in range(rounds):
            parts = data.batches(chosen if seed is None else rng.permutation(chosen))
            self.rows += parts if seed is None else [parts[i] for i in rng.permutation(len(parts))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data.batch(self.rows[index])


def _judge(lesson: _Lesson, data: _Texts, held: Array) -> float:
    """The loss on the held-out texts, batches counting alike, as Trainer's own evaluation does."""
    lesson.eval()
    where = next(lesson.parameters()).device
    with torch.no_grad():
        found = [float(lesson(**data.batch(rows, where))["loss"]) for rows in data.batches(held)]
    return float(np.mean(found))


def _affordable(lesson: _Lesson, data: _Texts, learnt: Array, seconds: float) -> int:
    """How many steps fit into so many seconds, at least one, by a few that are thrown away."""
    rows = _Batches(data, learnt, rounds=1, seed=0).rows
    where = next(lesson.parameters()).device
    trained = [value for value in lesson.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    times = []
    for i in range(TIMED_STEPS):
        begun = time.perf_counter()
        lesson(**data.batch(rows[i % len(rows)], where))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return int(min(MOST_STEPS, max(1, seconds / float(np.mean(times[1:])))))


def _fit(
    lesson: _Lesson,
    data: _Texts,
    learnt: Array,
    held: Array,
    recipe: Recipe,
    steps: int,
    folder: Path,
    seed: int,
    report: Callable[[Progress], None] | None,
    start: float,
    zeros: Zeros,
) -> list[Progress]:
    """Trains in place, up to the best state, and gives the checks."""
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    every = max(1, steps // CHECKS)
    arguments = TrainingArguments(
        **usual(folder, steps, seed=seed),
        per_device_train_batch_size=1,  # an item is a batch already
        per_device_eval_batch_size=1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=True,
        remove_unused_columns=False,
        label_names=[],
        prediction_loss_only=True,
    )
    if arguments.n_gpu > 1:  # one process with several GPUs: DataParallel would take batches apart, so it has the first
        arguments._n_gpu = 1
    checks: list[Progress] = []
    begun, spent_before = time.monotonic(), read_notes(folder).get("seconds", 0.0)

    def now() -> float:
        return float(spent_before + time.monotonic() - begun)

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            zeros.keep()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            latest = checks[-1] if checks else Progress(0.0, 0, start, start)
            if report and state.is_world_process_zero:
                report(Progress(now(), state.global_step, latest.distance, latest.best))

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            loss = float(more["metrics"]["eval_loss"])
            best = min(value for value in (loss, start, *(c.distance for c in checks)) if math.isfinite(value))
            checks.append(Progress(now(), state.global_step, loss, best))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                remember(folder, {**read_notes(folder), "seconds": now(), "checks": [asdict(one) for one in checks]})

    rounds = -(-steps // max(1, len(data.batches(learnt))))
    trainer = Trainer(
        model=lesson,
        args=arguments,
        train_dataset=_Batches(data, learnt, rounds=rounds, seed=seed),
        eval_dataset=_Batches(data, held, rounds=1, seed=None),
        data_collator=lambda items: items[0],
        callbacks=[EarlyStoppingCallback(recipe.patience), Watch()],
    )
    trainer.remove_callback(PrinterCallback)  # `report` tells
    for broken in (one for one in folder.glob("checkpoint-*") if not (one / "trainer_state.json").exists()):
        shutil.rmtree(broken, ignore_errors=True)  # stopped while it was written: the state comes last
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    checks += [Progress(**one) for one in read_notes(folder).get("checks", [])] if last else []
    trainer.train(resume_from_checkpoint=last)
    return checks


# ------------------------------------------------------------------------------------------------- what is on disk


def _job(folder: Path, job: list[Any]) -> dict[str, Any]:
    """What an earlier call left; FingerprintMismatch if it was another training."""
    digest = hashlib.sha256(canonical_json(job).encode()).hexdigest()
    found = read_notes(folder)
    if found and found["job"] != digest:
        raise FingerprintMismatch(f"{folder} holds checkpoints of another training; name another folder")
    return found or {"job": digest}


def _digest(tokens: Tokens, labels: Array | None) -> str:
    found = hashlib.sha256(tokens.lengths.tobytes() + (b"" if labels is None else labels.tobytes()))
    for ids in tokens.ids:
        found.update(ids.tobytes())
    return found.hexdigest()
