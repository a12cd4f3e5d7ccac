"""Everything a run starts from: the model described, the data split and tokenized, the batches to time with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from paredown import __version__, registry
from paredown.anatomy import describe
from paredown.calibration import tensors
from paredown.decoder import Decoder
from paredown.encoder import Encoder
from paredown.errors import BadData, UnsupportedModel
from paredown.models import CAUSAL_LM, EMBEDDING, LoadedModel, load_model
from paredown.network import Forward, Network, network
from paredown.pipeline._memory import at_once, give_back_what_is_freed
from paredown.pipeline._settings import POLICY, Settings
from paredown.surgery import fold
from paredown.tasks import (
    LinearProbe,
    Splits,
    Task,
    TextData,
    Tokens,
    length_sorted_batches,
    pad,
    run_batches,
    similar_lengths,
    split,
    text_classification,
    tokenize,
)
from paredown.tasks.causal_lm import likelihoods, windows
from paredown.types import Anatomy, Array, canonical_json
from paredown.validation.machine import card
from paredown.validation.quality import least_bound

BATCH = 64  # texts of an Offline batch, sorted by length
TIMED_TEXTS = 128  # in whole batches of evenly spread ranks by length
TIMED_SINGLES = 32
TIMED_TOKENS = 8_000  # of the Offline texts together: long texts need fewer of them
TIMED_BATCH_TOKENS = 4096  # of one Offline batch: 64 texts of up to 64 tokens, 8 of 512
CALIBRATION_BATCH_TOKENS = 2048  # of one batch with gradients: autograd keeps every layer's activations
MOST_BYTES = 2**31 - 2**26  # of fp32 weights: an ONNX file holds less than 2 GiB, its graph included
EVALUATED_TOKENS = 200_000  # of a split: long texts are judged on fewer of them, or judging would take hours
EVALUATED_TEXTS = 400  # at least,
EVALUATED_PASSAGES = 16  # or so many passages of a language model's text, each of hundreds of tokens
PROBED_TEXTS = 1000  # at least, where an embedder has to serve a linear classifier: 77 classes need some each
LONGEST_CONTEXT = 2048  # tokens of a language model's windows unless --max-length allows more
CALIBRATION_WINDOW = 512  # tokens of a window that scores and recovers: four of them are a batch


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
    def network(self) -> Network:
        return network(self.model, self.anatomy.layout)

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.model, self.anatomy.layout)

    @property
    def generates(self) -> bool:
        """Whether it is a language model rather than a text encoder."""
        return self.loaded.task == CAUSAL_LM

    @property
    def classifies(self) -> bool:
        return bool(self.loaded.labels)

    @property
    def together(self) -> int:
        """How many processes that time its candidates may be alive at once."""
        return at_once(self.model)

    def timing(self) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
        """The inputs of batches and of single texts to time with."""
        return timing_batches(self.guardrail)

    def answers(self, candidate: Any, part: str, threads: int | None) -> Array:
        """What a candidate answers to the "guardrail" or "test" texts [N, ...]."""
        texts = self.task.all_texts(getattr(self.splits, part))
        found: Array = candidate.outputs(self, getattr(self, part), texts, threads)
        return found

    def dense_answers(self, part: str) -> Array:
        """What the dense model answers to them."""
        return outputs_of(self.network, getattr(self, part))


def prepare(settings: Settings, *, probed: bool = False, judged_tokens: int = EVALUATED_TOKENS) -> Prepared:
    """Reads and checks all input. Raises UnsupportedModel or BadData before any long work has begun.

    `probed`: where an embedder's data has labels, its task is to serve a linear classifier (`tasks.LinearProbe`).
    Guardrail and test texts are about as many as hold `judged_tokens`.
    """
    loaded = load_model(settings.model, task=settings.task)
    generates = loaded.task == CAUSAL_LM
    longest = settings.max_length or (LONGEST_CONTEXT if generates else loaded.max_length)
    loaded = replace(loaded, max_length=min(loaded.max_length, longest))
    if not generates:
        _check_size(loaded)
    task = task_of(loaded.task)
    embeds = loaded.task == EMBEDDING
    labelled = probed and embeds and text_classification.has_labels(settings.data, settings.label_column)
    if labelled:
        data, evaluation = _labelled(settings)
    else:
        data = load_data(settings.data, loaded, settings, evaluation=settings.eval is None)
        evaluation = load_data(settings.eval, loaded, settings, evaluation=True, part="test") if settings.eval else None
    splits = split(data, evaluation, seed=settings.seed)
    folded, folds = fold(loaded.model, describe_loaded(loaded, loaded.model))
    anatomy = describe_loaded(loaded, folded)
    inputs = network(folded, anatomy.layout).input_names
    tokens, parts, notes = {}, {}, list(splits.notes)
    for name in ("calibration", "guardrail", "test"):
        part: TextData = getattr(splits, name)
        texts, learnt = task.all_texts(part), name == "calibration"
        if generates:
            length = min(loaded.max_length, CALIBRATION_WINDOW) if learnt else loaded.max_length
            tokens[name] = windows(loaded.tokenizer, texts, max_length=length, stride=length if learnt else None)
        else:
            tokens[name] = tokenize(loaded.tokenizer, texts, max_length=loaded.max_length, input_names=inputs)
        parts[name] = part
        owner = tokens[name].owner
        owner = np.arange(len(tokens[name])) % len(part) if owner is None else owner  # partners come after the texts
        least = EVALUATED_PASSAGES if generates else EVALUATED_TEXTS
        count = len(part) if learnt else affordable(tokens[name], least, owner=owner, most_tokens=judged_tokens)
        if count < len(part):
            notes.append(f"{count} of {len(part)} {name} texts are used: they are long ({judged_tokens} tokens).")
            parts[name] = part.take(np.arange(count))
            tokens[name] = tokens[name].take(np.flatnonzero(owner < count))
    cut_off = sum(one.truncated for one in tokens.values())
    if cut_off:
        notes.append(f"{cut_off} texts are longer than {loaded.max_length} tokens and were truncated.")
    splits = replace(splits, guardrail=parts["guardrail"], test=parts["test"])
    notes += filter(None, [too_few(settings, task, splits.guardrail)])
    prepared = Prepared(loaded, folded, anatomy, folds, task, splits, **tokens, notes=tuple(notes))
    return _probing(prepared) if labelled else prepared


def _labelled(settings: Settings) -> tuple[TextData, TextData | None]:
    """The texts of an embedder's data with their labels, whatever these are called."""
    read = partial(text_classification.load_named, text_column=settings.text_column, label_column=settings.label_column)
    data, names = read(settings.data)
    return data, read(settings.eval, known=names, part="test")[0] if settings.eval else None


def _probing(prepared: Prepared) -> Prepared:
    """With the task of serving a linear classifier, fitted to the dense embeddings of calibration texts."""
    labels = prepared.splits.calibration.labels
    assert labels is not None
    count = affordable(prepared.calibration, PROBED_TEXTS)
    embeddings = outputs_of(prepared.network, prepared.calibration.take(np.arange(count)))
    return replace(prepared, task=cast(Task, LinearProbe(embeddings, labels[:count])))


def _check_size(loaded: LoadedModel) -> None:
    size = sum(parameter.numel() * 4 for parameter in loaded.model.parameters())
    if size > MOST_BYTES:
        raise UnsupportedModel(
            f"{loaded.source} has {size / 2**30:.1f} GiB of fp32 weights, and an ONNX file takes 2 GiB at most: "
            "that is the largest model that Paredown can prune."
        )


def too_few(settings: Settings, task: Task, guardrail: TextData) -> str:
    """The sentence for a gate that not even a model that answers all alike can pass; empty where it can."""
    gate, sure, count = settings.gate, settings.confidence, len(guardrail)
    if gate is None or task.metric_name(guardrail) != "accuracy" or least_bound(count, sure) <= gate:
        return ""
    if gate <= 0:
        return "The gate cannot pass: no number of texts can show that accuracy drops by nothing."
    needed = next(n for n in itertools.count(count) if least_bound(n, sure) <= gate)
    return (
        f"The gate cannot pass: it has {count} texts, and {needed} are needed to show a drop of at most {gate:.2%} in "
        f"accuracy with a confidence of {sure:g}; give more texts (60 % of --eval go to the gate), or allow more."
    )


def run_key(settings: Settings, prepared: Prepared) -> str:
    """Names a run by all that its results depend on: settings, texts, weights, versions, machine."""
    machine = card()
    nowhere = replace(settings, model="", data="", eval=None, out="")  # a file has many paths: what it holds counts
    if settings.tokens:
        policy = hashlib.sha256((Path(settings.tokens) / POLICY).read_bytes())
        nowhere = replace(nowhere, tokens=policy.hexdigest())
    about = [nowhere, __version__, machine["libraries"], machine["cpu"], machine["cores"]]
    found = hashlib.sha256(canonical_json(about).encode())
    for part in (prepared.calibration, prepared.guardrail, prepared.test):
        for ids in part.ids:
            found.update(ids.tobytes())
    for tensor in prepared.model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def affordable(
    tokens: Tokens, least: int = EVALUATED_TEXTS, *, owner: Array | None = None, most_tokens: int = EVALUATED_TOKENS
) -> int:
    """How many of the first examples to judge on; `owner` says whose a row is where an example has several."""
    cost = np.bincount(np.arange(len(tokens)) if owner is None else owner, weights=tokens.lengths)
    return min(len(cost), max(least, int(np.searchsorted(np.cumsum(cost), most_tokens)) + 1))


def describe_loaded(loaded: LoadedModel, model: Any) -> Anatomy:
    return describe(model, task=loaded.task, pooling=loaded.pooling, normalize=loaded.normalize)


def task_of(name: str) -> Task:
    """The task's module, seen as a `Task`."""
    return cast(Task, registry.find("tasks", name))


def load_data(path: str, loaded: LoadedModel, settings: Any, *, evaluation: bool, part: str = "train") -> TextData:
    """The texts of one file, with labels or scores where the task has them. `evaluation` data must have labels.

    Of a file of intents (CLINC150) the `part` is read.
    """
    module: Any = registry.find("tasks", loaded.task)
    if loaded.task == CAUSAL_LM:
        data: TextData = module.load(path, text_column=settings.text_column)
    elif loaded.labels is not None:
        data = module.load(
            path,
            text_column=settings.text_column,
            label_column=settings.label_column,
            labels=loaded.labels,
            require_labels=evaluation,
            part=part,
        )
    else:
        data = module.load(
            path,
            text_column=settings.text_column,
            pair_column=settings.pair_column if evaluation else None,
            score_column=settings.score_column if evaluation else None,
            part=part,
        )
    if not len(data):
        raise BadData(f"{path} holds no texts.")
    return data


def timing_batches(
    tokens: Tokens, *, batch_size: int = BATCH, most_tokens: int = TIMED_TOKENS
) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
    """The inputs of `timed_batches`, and of single texts of evenly spread ranks by length."""
    singles = evenly(np.argsort(tokens.lengths, kind="stable"), TIMED_SINGLES)
    chosen = [*timed_batches(tokens, batch_size=batch_size, most_tokens=most_tokens), *singles[:, None]]
    arrays: list[Mapping[str, Array]] = [
        pad([tokens.ids[i] for i in at], pad_id=tokens.pad_id, input_names=tokens.input_names) for at in chosen
    ]
    return arrays[: -len(singles)], arrays[-len(singles) :]


def timed_batches(tokens: Tokens, *, batch_size: int = BATCH, most_tokens: int = TIMED_TOKENS) -> list[Array]:
    """Which texts are timed together: of the batches in which all texts would be served, sorted by length, some of
    evenly spread ranks, so that they are padded as little as those.

    They hold about `TIMED_TEXTS` texts or `most_tokens`, whichever is less: a part of one batch, with eight texts at
    least, or several whole ones.
    """
    every = np.arange(len(tokens))
    batches = similar_lengths(tokens.lengths, every, batch_size=batch_size, most_tokens=TIMED_BATCH_TOKENS)
    texts = min(TIMED_TEXTS, most_tokens / max(1.0, float(tokens.lengths.mean())))
    count = max(1, round(texts * len(batches) / len(tokens)))
    places = evenly(np.arange(len(batches)), count)
    if count > 1:
        return [batches[i] for i in places]
    return [evenly(batches[places[0]], max(8, round(texts)))]


def evenly(values: Array, count: int) -> Array:
    """So many of the values, or all: the middles of as many equal parts of them."""
    count = min(count, len(values))
    middles: Array = values[((np.arange(count) + 0.5) * len(values) / count).astype(int)]
    return middles


def calibration_batches(tokens: Tokens, *, most_tokens: int, most_texts: int = 4096) -> list[Mapping[str, Array]]:
    """Length-sorted batches of the first calibration texts (they are in random order) up to a number of tokens."""
    count = min(most_texts, int(np.searchsorted(np.cumsum(tokens.lengths), most_tokens)) + 1, len(tokens))
    chosen = length_sorted_batches(
        tokens, batch_size=64, indices=np.arange(count), most_tokens=CALIBRATION_BATCH_TOKENS
    )
    shuffled = np.random.default_rng(0).permutation(len(chosen))  # the last ones judge: they must not be the longest
    return [chosen[i][1] for i in shuffled]


def outputs_of(model: Forward, tokens: Tokens) -> Array:
    """What the model gives for every text [N, ...], in order."""
    with torch.inference_mode():
        if isinstance(model, Decoder):
            assert tokens.owner is not None
            outputs = likelihoods(
                lambda arrays: model.log_likelihood(**tensors(arrays, model)).numpy(),
                tokens,
                texts=int(tokens.owner.max()) + 1,
            )
        else:
            outputs = run_batches(lambda arrays: model(**tensors(arrays, model)).float().numpy(), tokens)
    give_back_what_is_freed()
    return outputs
