"""Everything a run starts from: the model described, the data split and tokenized, the batches to time with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from paredown import registry
from paredown.anatomy import describe
from paredown.calibration import tensors
from paredown.encoder import Encoder
from paredown.errors import BadData
from paredown.models import LoadedModel, load_model
from paredown.pipeline._settings import Settings
from paredown.surgery import fold
from paredown.tasks import Splits, Task, TextData, Tokens, length_sorted_batches, run_batches, split, tokenize
from paredown.types import Anatomy, Array

BATCH = 64  # texts of an Offline batch, sorted by length
TIMED_TEXTS = 256  # enough for the shape of the length histogram
TIMED_SINGLES = 40
TIMED_TOKENS = 60_000  # of the Offline texts together: long texts need fewer of them


@dataclass(frozen=True)
class Prepared:
    """The dense model (with its exact folds), its anatomy, and the three splits with their tokens."""

    loaded: LoadedModel
    model: Any
    anatomy: Anatomy
    folds: tuple[str, ...]
    task: Task
    splits: Splits
    calibration: Tokens
    guardrail: Tokens
    test: Tokens
    notes: tuple[str, ...]

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.model, self.anatomy.layout)

    @property
    def classifies(self) -> bool:
        return bool(self.loaded.labels)

    def timing_batches(self, *, batch_size: int = BATCH) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
        """Offline batches, and single texts, drawn from the guardrail texts: the lengths the user will serve."""
        return timing_batches(self.guardrail, batch_size=batch_size)


def prepare(settings: Settings) -> Prepared:
    """Reads and checks all input. Raises UnsupportedModel or BadData before any long work has begun."""
    loaded = load_model(settings.model, task=settings.task)
    task = task_of(loaded.task)
    data = load_data(settings.data, loaded, settings, evaluation=settings.eval is None)
    evaluation = load_data(settings.eval, loaded, settings, evaluation=True) if settings.eval else None
    splits = split(data, evaluation, seed=settings.seed)
    folded, folds = fold(loaded.model, describe_loaded(loaded, loaded.model))
    anatomy = describe_loaded(loaded, folded)
    length = min(loaded.max_length, settings.max_length or loaded.max_length)
    names = Encoder(folded, anatomy.layout).input_names
    tokens = {
        name: tokenize(loaded.tokenizer, task.all_texts(part), max_length=length, input_names=names)
        for name, part in (("calibration", splits.calibration), ("guardrail", splits.guardrail), ("test", splits.test))
    }
    cut_off = sum(one.truncated for one in tokens.values())
    notes = splits.notes + (
        (f"{cut_off} texts are longer than {length} tokens and were truncated.",) if cut_off else ()
    )
    return Prepared(loaded, folded, anatomy, folds, task, splits, **tokens, notes=notes)


def describe_loaded(loaded: LoadedModel, model: Any) -> Anatomy:
    return describe(model, task=loaded.task, pooling=loaded.pooling, normalize=loaded.normalize)


def task_of(name: str) -> Task:
    """The task's module, seen as a `Task`."""
    return cast(Task, registry.find("tasks", name))


def load_data(path: str, loaded: LoadedModel, settings: Any, *, evaluation: bool) -> TextData:
    """The texts of one file, with labels or scores where the task has them. `evaluation` data must have labels."""
    module: Any = registry.find("tasks", loaded.task)
    if loaded.labels is not None:
        data: TextData = module.load(
            path,
            text_column=settings.text_column,
            label_column=settings.label_column,
            labels=loaded.labels,
            require_labels=evaluation,
        )
    else:
        data = module.load(
            path,
            text_column=settings.text_column,
            pair_column=settings.pair_column if evaluation else None,
            score_column=settings.score_column if evaluation else None,
        )
    if not len(data):
        raise BadData(f"{path} holds no texts.")
    return data


def timing_batches(
    tokens: Tokens, *, batch_size: int = BATCH, seed: int = 0
) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
    """Length-sorted batches of a sample of the texts, and single texts of another."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tokens.ids))
    lengths = np.asarray([len(tokens.ids[i]) for i in order])
    fits = int(np.searchsorted(np.cumsum(lengths), TIMED_TOKENS)) + 1
    offline = order[: max(min(TIMED_TEXTS, fits), min(batch_size, len(order)))]
    batches = [arrays for _, arrays in length_sorted_batches(tokens, batch_size=batch_size, indices=offline)]
    singles = [arrays for _, arrays in length_sorted_batches(tokens, batch_size=1, indices=order[-TIMED_SINGLES:])]
    return list(batches), list(singles)


def calibration_batches(tokens: Tokens, *, most_tokens: int, most_texts: int = 4096) -> list[Mapping[str, Array]]:
    """Length-sorted batches of the first calibration texts (they are in random order) up to a number of tokens."""
    lengths = np.asarray([len(one) for one in tokens.ids])
    count = min(most_texts, int(np.searchsorted(np.cumsum(lengths), most_tokens)) + 1, len(lengths))
    chosen = length_sorted_batches(tokens, batch_size=32, indices=np.arange(count))
    shuffled = np.random.default_rng(0).permutation(len(chosen))  # the last ones judge: they must not be the longest
    return [chosen[i][1] for i in shuffled]


def outputs_of(encoder: Encoder, tokens: Tokens) -> Array:
    """What the encoder gives for every text [N, ...], in order, in full precision."""
    with torch.inference_mode():
        return run_batches(lambda arrays: encoder(**tensors(arrays, encoder)).numpy(), tokens)


def take(tokens: Tokens, indices: Sequence[int] | Array) -> Tokens:
    """The tokens of some of the texts."""
    return Tokens(tuple(tokens.ids[i] for i in indices), tokens.pad_id, tokens.input_names, 0)
