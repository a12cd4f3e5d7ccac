"""Sentence encoders trained by sentence-transformers: its trainer, its losses, its folders.

`contrast` learns from pairs that mean the same (multiple negatives ranking: Henderson et al. 2017, arXiv:1705.00652):
of all texts of a batch, a text's own partner has to be the nearest. `distill` learns a teacher's embeddings (Reimers &
Gurevych 2020, arXiv:2004.09813), so its texts need nothing beside them.

Legend: N texts, B texts of a batch, D width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from paredown.errors import MissingExtra
from paredown.models import silenced
from paredown.recovery._checkpoint import Progress
from paredown.recovery._trainer import expected_warnings, own_random_state, read_notes, remember, usual
from paredown.tasks import similar_lengths
from paredown.types import Array

CONTRAST, DISTILL = "contrast", "distill"
PACKAGES = {"sentence_transformers": "sentence-transformers", "datasets": "datasets", "accelerate": "accelerate"}
BEST = "best"  # the folder of what a training that is over has learnt
CHECKS = 10  # of the held-out loss in a training, and as many checkpoints; fewer where they would take more than
JUDGING = 0.2  # of the minutes
PATIENCE = 3  # checks without a better loss end it
TIMED_STEPS = 6  # by which steps are made out of minutes; the first two are left out
MOST_STEPS = 1_000_000
CHUNK = 40  # batches that are sorted by length together: shuffled, and yet little is padding


@dataclass(frozen=True)
class Lesson:
    """What is learnt: columns of N rows, and of rows that judge and are not learnt from.

    To `contrast` they are "anchor", "positive" and, if there are any, "negative" texts in this order; with a "label"
    [N] of integers no label is twice in a batch. To `distill` they are "text" and as "label" the teacher's embeddings
    [N, D]. Modules of the transformer named in `frozen` are not trained.
    """

    objective: str
    learnt: Mapping[str, Any]
    held: Mapping[str, Any]
    frozen: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.learnt.values())))


@dataclass(frozen=True)
class Course:
    """How a lesson is learnt. Exactly one of `steps`, `epochs` and `minutes` is set.

    Minutes become steps by timing a few, so that the schedule (10 % warm-up, then a cosine) ends with them.
    """

    learning_rate: float
    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.minutes)) != 1:
            raise ValueError("say how long to train: one of steps, epochs and minutes")


def check_installed() -> None:
    """Raises MissingExtra unless everything that `fit_embedder` needs is there."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(package, "embedder")


def fit_embedder(
    start: Path,
    lesson: Lesson,
    course: Course,
    folder: Path,
    *,
    report: Callable[[Progress, int], None] | None = None,
) -> tuple[Path, list[Progress]]:
    """A sentence-transformers folder inside `folder` with the state that was best on the held rows, and the checks.

    `start` is such a folder, and stays as it is; it comes back itself when no state was better. `report` is told the
    progress and the number of steps after each.

    Checkpoints lie in `folder`, which belongs to this training alone. Ctrl-C and SIGTERM end it after the step that it
    is at, with a checkpoint, as KeyboardInterrupt; a second one at once. A later call goes on from there and comes to
    the same end. Raises MissingExtra without sentence-transformers, datasets or accelerate.
    """
    check_installed()
    notes = read_notes(folder)
    if "model" not in notes:
        with own_random_state(), silenced(), expected_warnings():
            if "steps" not in notes:
                notes = _begun(start, lesson, course, folder)
            notes = _trained(start, lesson, course, folder, notes, report)
    checks = [Progress(0.0, 0, notes["start"], notes["start"]), *(Progress(**one) for one in notes["checks"])]
    return (folder / BEST if notes["model"] == BEST else start), checks


def _begun(start: Path, lesson: Lesson, course: Course, folder: Path) -> dict[str, Any]:
    """The first notes: the loss at the start, and the number of steps."""
    took: list[float] = []
    model, steps = _opened(start, lesson), course.steps or TIMED_STEPS
    probe = _trainer(model, lesson, course, folder / "probe", TIMED_STEPS, _stopwatch(took))
    clock = time.perf_counter()
    loss = float(probe.evaluate()["eval_loss"])
    judging = time.perf_counter() - clock
    if course.epochs is not None:
        steps = math.ceil(course.epochs * len(probe.get_train_dataloader()))
    checks = CHECKS
    if course.minutes is not None:
        probe.train()
        seconds = 60 * course.minutes
        checks = min(CHECKS, max(1, int(JUDGING * seconds / max(1e-6, judging))))
        left = max((1 - JUDGING) * seconds, seconds - checks * judging)
        steps = int(left / max(1e-6, float(np.mean(took[2:]))))
    shutil.rmtree(folder / "probe", ignore_errors=True)
    steps = min(MOST_STEPS, max(1, steps))
    notes = {"start": loss, "steps": steps, "every": max(1, steps // checks), "seconds": 0.0, "checks": []}
    remember(folder, notes)
    return notes


def _trained(
    start: Path,
    lesson: Lesson,
    course: Course,
    folder: Path,
    notes: dict[str, Any],
    report: Callable[[Progress, int], None] | None,
) -> dict[str, Any]:
    """The notes with the checks of a training that is over; its best state lies in the folder."""
    from sentence_transformers import SentenceTransformer
    from transformers.trainer_utils import get_last_checkpoint

    for broken in (one for one in folder.glob("checkpoint-*") if not (one / "trainer_state.json").exists()):
        shutil.rmtree(broken, ignore_errors=True)  # stopped while it was written: the state comes last
    last = get_last_checkpoint(str(folder))
    reached = int(last.rpartition("-")[2]) if last else 0
    checks = [Progress(**one) for one in notes["checks"] if one["step"] <= reached]  # what came after comes again
    steps, began, spent, clock = int(notes["steps"]), float(notes["start"]), float(notes["seconds"]), time.monotonic()

    def now() -> float:
        return spent + time.monotonic() - clock

    with _asked_to_stop() as asked:
        watch = _watch(began, steps, checks, now, folder, notes, asked, report)
        trainer = _trainer(_opened(start, lesson), lesson, course, folder, steps, watch, every=notes["every"])
        trainer.train(resume_from_checkpoint=last)
        if asked:
            raise KeyboardInterrupt
    notes = {**notes, "seconds": now(), "checks": [asdict(one) for one in checks], "model": "start"}
    chosen = trainer.state.best_model_checkpoint
    if chosen and checks and checks[-1].best < began:
        beside = folder / f"{BEST}.part"
        shutil.rmtree(beside, ignore_errors=True)
        best = SentenceTransformer(chosen, device="cpu", local_files_only=True)
        best.save_pretrained(str(beside), create_model_card=False)
        shutil.rmtree(folder / BEST, ignore_errors=True)
        os.replace(beside, folder / BEST)
        notes["model"] = BEST
    remember(folder, notes)
    for done in folder.glob("checkpoint-*"):
        shutil.rmtree(done, ignore_errors=True)
    return notes


def _opened(start: Path, lesson: Lesson) -> Any:
    """The model to train. A student of a teacher without dropout has none either, or the two would differ for no
    reason.
    """
    from sentence_transformers import SentenceTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = SentenceTransformer(str(start), device=device, local_files_only=True)
    card = model.model_card_data  # a card is not kept: nothing is looked up or computed for it
    card.local_files_only, card.set_widget_examples = True, lambda _dataset: None
    transformer = model[0].auto_model
    for name in lesson.frozen:
        transformer.get_submodule(name).requires_grad_(False)
    if lesson.objective == DISTILL:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def _trainer(
    model: Any,
    lesson: Lesson,
    course: Course,
    folder: Path,
    steps: int,
    callback: Any,
    *,
    every: int = 0,
) -> Any:
    """sentence-transformers' trainer of a lesson, which judges and writes a checkpoint after `every` so many steps."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MSELoss, MultipleNegativesRankingLoss
    from transformers import EarlyStoppingCallback, PrinterCallback

    when = "steps" if every else "no"
    arguments = SentenceTransformerTrainingArguments(
        **usual(folder, steps, seed=course.seed),
        per_device_train_batch_size=course.batch_size,
        per_device_eval_batch_size=course.batch_size,
        learning_rate=course.learning_rate,
        weight_decay=0.01,
        batch_sampler=cast(Any, _sampler(lesson)),
        eval_strategy=when,
        eval_steps=max(1, every),
        save_strategy=when,
        save_steps=max(1, every),
        load_best_model_at_end=bool(every),
    )
    if arguments.n_gpu > 1:  # DataParallel would take batches apart, and with them the negatives
        arguments._n_gpu = 1
    sets = [Dataset.from_dict(dict(columns)) for columns in (lesson.learnt, lesson.held)]
    if lesson.objective == DISTILL:  # embeddings as tensors: as lists of numbers they would cost more than a step
        sets = [one.with_format("torch", columns=["label"], output_all_columns=True) for one in sets]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        loss=MSELoss(model) if lesson.objective == DISTILL else MultipleNegativesRankingLoss(model),
        callbacks=[callback] + ([EarlyStoppingCallback(PATIENCE)] if every else []),
    )
    trainer.remove_callback(PrinterCallback)  # `report` tells
    return trainer


# -------------------------------------------------------------------------------------------------------- the batches


def _sampler(lesson: Lesson) -> Any:
    """Which rows come together in a batch: of similar length, or with no text, or no label, twice."""
    from sentence_transformers.base.sampler import BatchSamplers

    if lesson.objective == DISTILL:
        return _dealt_by_length
    return _dealt_by_label if "label" in lesson.learnt else BatchSamplers.NO_DUPLICATES


# By their names the trainer finds them again: it stores its arguments beside every checkpoint.
def _dealt_by_label(dataset: Any, *, batch_size: int, seed: int, **_: Any) -> _Dealt:
    return _Dealt(dataset, batch_size, seed, labels=np.asarray(dataset["label"]))


def _dealt_by_length(dataset: Any, *, batch_size: int, seed: int, **_: Any) -> _Dealt:
    return _Dealt(dataset, batch_size, seed, lengths=np.array([len(text) for text in dataset["text"]]))


class _Dealt(torch.utils.data.BatchSampler):
    """Batches of row numbers, dealt anew in every round: by label, or by length."""

    def __init__(
        self, dataset: Any, batch_size: int, seed: int, *, labels: Array | None = None, lengths: Array | None = None
    ):
        super().__init__(range(len(dataset)), batch_size, False)
        self.seed, self.labels, self.lengths, self.epoch = seed, labels, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer says which round it is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.labels is not None:
            yield from by_label(self.labels, self.batch_size, len(self), rng)
        elif self.lengths is not None:
            order, size = rng.permutation(len(self.lengths)), CHUNK * self.batch_size
            parts: list[Array] = []
            for at in range(0, len(order), size):
                chunk = order[at : at + size]
                parts += similar_lengths(self.lengths, chunk, batch_size=self.batch_size, most_tokens=2**62)
            for i in rng.permutation(len(parts)):
                yield parts[i].tolist()

    def __len__(self) -> int:
        rows = len(cast(Any, self.sampler))
        return max(1, rows // self.batch_size) if self.labels is not None else -(-rows // self.batch_size)


def by_label(labels: Array, batch_size: int, count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """So many batches of rows of labels that all differ.

    Labels with more rows left are drawn more often, so that frequent ones do not remain for the end. When fewer than
    half as many labels have rows left as a batch takes, those that have none begin anew.
    """
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    batch_size = min(batch_size, len(groups))
    decks: list[list[int]] = [[] for _ in groups]
    for _ in range(count):
        left = np.array([len(deck) for deck in decks])
        if (left > 0).sum() < max(2, batch_size / 2):
            decks = [deck or rng.permutation(rows).tolist() for deck, rows in zip(decks, groups, strict=True)]
            left = np.array([len(deck) for deck in decks])
        size = min(batch_size, int((left > 0).sum()))
        drawn = rng.choice(len(decks), size, replace=False, p=left / left.sum())
        yield [decks[i].pop() for i in drawn]


# ----------------------------------------------------------------------------------------------------- while it runs


def _stopwatch(took: list[float]) -> Any:
    """A callback that puts the seconds of every step into `took`."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            took.append(time.perf_counter() - self.begun)

    return Stopwatch()


def _watch(
    began: float,
    steps: int,
    checks: list[Progress],
    now: Callable[[], float],
    folder: Path,
    notes: Mapping[str, Any],
    asked: list[int],
    report: Callable[[Progress, int], None] | None,
) -> Any:
    """A callback that tells the progress, gathers the checks, and stops at a step's end when that was `asked`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if report:
                latest = checks[-1] if checks else Progress(0.0, 0, began, began)
                report(Progress(now(), state.global_step, latest.distance, latest.best), steps)
            if state.global_step == steps:  # the last state is judged too, whatever the steps between two checks
                control.should_evaluate = control.should_save = True
            if asked:
                control.should_save = control.should_training_stop = True

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            loss = float(more["metrics"]["eval_loss"])
            best = min(value for value in (loss, began, *(c.distance for c in checks)) if math.isfinite(value))
            checks.append(Progress(now(), state.global_step, loss, best))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            remember(folder, {**notes, "seconds": now(), "checks": [asdict(one) for one in checks]})

    return Watch()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM is put into, instead of breaking off a step; the second breaks off."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return

    def note(number: int, _frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
