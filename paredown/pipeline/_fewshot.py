"""Few-shot intents: what a linear classifier learns from a few texts per class on frozen embeddings, and their price.

Every model sees the same draws of shots and the same test texts, so their difference has a paired interval.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paredown import bundle as bundles
from paredown.cores import cores
from paredown.errors import BadData, ParedownError
from paredown.models import load_model
from paredown.pipeline import _loaders
from paredown.pipeline._embedders import INPUTS, Embedder, open_embedder
from paredown.pipeline._memory import at_once_of
from paredown.pipeline._prepare import describe_loaded, timed_batches
from paredown.pipeline._settings import Progress, Silent
from paredown.targets import export_stock
from paredown.tasks import (
    TextData,
    Tokens,
    draw_shots,
    fit_and_answer,
    intent_parts,
    pad,
    pool_and_test,
    text_classification,
    unit_rows,
)
from paredown.types import Array, canonical_json, finite
from paredown.validation.machine import card
from paredown.validation.shots import METRICS, judge, over_draws
from paredown.validation.timing import Alternative, measure, ratio

ROUNDS = 9
TIMED_SECONDS = 90.0
SAYS_LITTLE = ("model", "bundle")  # as the name of a folder


def fewshot(
    model: str,
    *,
    data: str,
    eval: str | None = None,
    against: Sequence[str] = (),
    shots: Sequence[int] = (1, 2, 3, 5, 10),
    seeds: int = 10,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy and weighted F1 by shots and model, and what embedding takes: `rows` and `timing`.

    `model` and `against` are models or bundles; every one of `against` is compared with `model`. A bundle alone is
    compared with the dense model that its report names, where that is still there. Of each label in `data` so many
    `shots` are drawn by each of `seeds` draws, and a logistic regression on the embeddings of those answers `eval`;
    without it the test part of a file of intents (CLINC150), or 40 % of each label in `data`. Raises BadData and
    UnsupportedModel before any long work.
    """
    progress = progress or Silent()
    shots = _checked(shots, seeds, max_length)
    data, paths = str(data), [str(path) for path in (model, *against)]  # paths are welcome too
    progress.stage("Reading models and data")
    pool, test, names, notes = _read(data, eval and str(eval), text_column, label_column, shots[-1], seed)
    with _threads(threads or cores()):
        paths, more = (paths, []) if against else _with_its_dense_model(paths[0])
        sides = [open_embedder(path, threads=threads or cores()) for path in paths]
        notes += [*more, *_about_classifiers(sides)]
        drawn = np.stack([draw_shots(_labels(pool), len(names), shots[-1], seed=(seed, i)) for i in range(seeds)])
        called = _names(paths)
        embedded, tokens = _embedded(sides, called, pool, test, drawn, max_length, progress)
        notes += _truncated(called, tokens)
        about = [
            {"name": name, "path": side.source, "kind": "bundle" if side.is_bundle else "dense"}
            | {"pooling": side.pooling, "parameters": side.parameters, "width": rows.shape[1]}
            for name, side, rows in zip(called, sides, embedded, strict=True)
        ]
        timing = _timed(sides, called, tokens, threads, progress)
        answers = _answers(embedded, pool, test, drawn, shots, threads or cores(), progress)
    progress.stage("Resampling")
    facts = {
        "model": paths[0],
        "data": data,
        "eval": eval and str(eval),
        "models": about,
        "shots": list(shots),
        "seeds": seeds,
        "seed": seed,
        "classes": len(names),
        "pool": len(pool),
        "samples": len(test),
        "rows": _rows(answers, _labels(test), called, shots, seed),
        "timing": timing,
        "notes": notes,
        "machine": card(),
    }
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return plain


def _checked(shots: Sequence[int], seeds: int, max_length: int | None) -> tuple[int, ...]:
    wrong = [k for k in shots if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1]
    if wrong or not shots:
        raise ParedownError(
            f"Shots are whole numbers of 1 or more, such as 1, 2, 5; not {wrong[0] if wrong else '()'}."
        )
    if seeds < 1:
        raise ParedownError("seeds is a number of draws, 1 or more.")
    if max_length is not None and max_length < 4:
        raise ParedownError("max_length is 4 tokens or more.")
    return tuple(sorted({int(k) for k in shots}))


def _read(
    data: str, eval: str | None, text_column: str | None, label_column: str | None, most: int, seed: int
) -> tuple[TextData, TextData, tuple[str, ...], list[str]]:
    """The texts to draw from, those to test on, the names of the labels, and what was said on the way."""
    read = partial(text_classification.load_named, text_column=text_column, label_column=label_column)
    loaded, names = read(data)
    source = eval or (data if "test" in intent_parts(data) else None)
    evaluation = read(source, known=names, part="test")[0] if source else None
    pool, test, notes = pool_and_test(loaded, evaluation, seed=seed)
    counts = np.bincount(_labels(pool), minlength=len(names))
    least, few = int(counts.min()), int((counts < most).sum())
    if few:
        have = f"{names[int(counts.argmin())]!r} has {least:,} {'text' if least == 1 else 'texts'} to draw from"
        have += "" if source else " once 40 % are set aside to test on (unless --eval names a file for that)"
        others = "1 other label has" if few == 2 else f"{few - 1:,} other labels have"
        have += f"; {others} too few as well" if few > 1 else ""
        raise BadData(f"{data}: {most:,} shots were asked for, but the label {have}.")
    return pool, test, names, list(notes)


def _labels(data: TextData) -> Array:
    assert data.labels is not None
    return data.labels


def _with_its_dense_model(path: str) -> tuple[list[str], list[str]]:
    """The path; of a bundle, before it the dense model, if that can be found and is the one. And what is to be said."""
    if not (Path(path) / bundles.MANIFEST).is_file():
        return [path], []
    opened = bundles.load(Path(path))
    try:
        source = opened.report().get("model")
        if source is None:
            raise ParedownError("its report names none")
        loaded = load_model(source, task=opened.manifest["task"])
        if describe_loaded(loaded, loaded.model).fingerprint != opened.plan.fingerprint:
            raise ParedownError(f"{source} has other tensors or shapes")
    except ParedownError as error:
        return [path], [f"{path} is not compared with its dense model: {error}; name both to compare them."]
    return [str(source), path], []


def _about_classifiers(sides: Sequence[Embedder]) -> list[str]:
    named = [side.source for side in sides if side.classifier]
    said = "is a classifier: its embedding is the mean over the last layer's tokens, by torch in fp32."
    return [f"{path} {said}" for path in named]


def _names(paths: Sequence[str]) -> list[str]:
    """Short names that differ: as many of the last parts of each path as it takes, and two of one that says little."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-max(length, 2 if part[-1] in SAYS_LITTLE else 1) :]) for part in parts]
        if len(set(found)) == len(set(map(tuple, parts))):
            break
    repeats = [found[:i].count(name) for i, name in enumerate(found)]
    return [name if not before else f"{name} ({before + 1})" for name, before in zip(found, repeats, strict=True)]


def _embedded(
    sides: Sequence[Embedder],
    called: Sequence[str],
    pool: TextData,
    test: TextData,
    drawn: Array,
    max_length: int | None,
    progress: Progress,
) -> tuple[list[Array], list[Tokens]]:
    """By each model the unit rows of pool and test texts, one after the other (zeros for what is never drawn), and the
    tokens of the test texts. Every distinct text is embedded once.
    """
    texts = [*(pool.texts[i] for i in np.unique(drawn)), *test.texts]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    places = np.array([distinct[text] for text in texts])
    rows = np.concatenate([np.unique(drawn), len(pool) + np.arange(len(test))])
    found, tokens = [], []
    for side, name in zip(sides, called, strict=True):
        own = side.tokens(list(distinct), max_length=max_length)
        progress.stage(f"Embedding by {name}", len(distinct))
        vectors = unit_rows(side.embed(own, progress.advance))
        side.runner.close()
        table = np.zeros((len(pool) + len(test), vectors.shape[1]))
        table[rows] = vectors[places]
        found.append(table)
        tokens.append(own)
    return found, tokens


def _truncated(called: Sequence[str], tokens: Sequence[Tokens]) -> list[str]:
    return [
        f"{one.truncated:,} texts are longer than {name} reads and were truncated."
        for name, one in zip(called, tokens, strict=True)
        if one.truncated
    ]


def _timed(
    sides: Sequence[Embedder],
    called: Sequence[str],
    tokens: Sequence[Tokens],
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Texts per second of every model on the same texts, and how many times as fast as the first one the others are.

    Where a bundle serves on another runtime, dense models are timed there as well, as exported without Paredown, and
    the first model's fastest is what counts.
    """
    targets = sorted({side.target for side in sides})
    suffixes = _suffixes(tokens)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, tuple[int, str, Alternative]] = {}
        for i, side in enumerate(sides):
            for target in targets if side.dense else [side.target]:
                name = f"{called[i]}, {target}" if side.dense and len(targets) > 1 else called[i]
                loader, path = _file(side, target, Path(folder) / f"{i}.onnx")
                options = {"loader": loader, "suffix": suffixes[i]}
                found[name] = i, target, Alternative(name, _loaders.WITH_OWN_INPUTS, path, options)
        progress.stage("Timing, interleaved", ROUNDS)
        timed = measure(
            [one for _, _, one in found.values()],
            _timing_batches(tokens, suffixes),
            rounds=ROUNDS,
            threads=threads,
            seconds=TIMED_SECONDS,
            together=at_once_of(4 * max(side.parameters for side in sides)),
            progress=lambda done, of: progress.advance(ROUNDS / of),
        )
    first = max((timed[name] for name, (i, _, _) in found.items() if i == 0), key=lambda one: one.texts_per_second)
    rows = [
        {
            "name": name,
            "model": called[i],
            "target": target,
            "precision": sides[i].precision,
            "texts_per_second": timed[name].texts_per_second,
            "speedup": ratio(first, timed[name]) if i else None,
        }
        for name, (i, target, _) in found.items()
    ]
    return {"rows": rows, "against": first.name if len(sides) > 1 else None, "texts": first.texts}


def _file(side: Embedder, target: str, exported: Path) -> tuple[str, str]:
    """The loader and what it loads: a model or bundle itself, or the stock export of a dense model, made if need be."""
    if target == "torch" or side.dense is None:
        return _loaders.EMBEDDER, side.source
    path = exported if exported.exists() else export_stock(side.dense, exported)
    return (_loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO), str(path)


def _suffixes(tokens: Sequence[Tokens]) -> list[str]:
    """How the arrays of each model are called: models that read the same tokens share them."""
    kinds: list[Tokens] = []
    found = []
    for own in tokens:
        same = [i for i, kind in enumerate(kinds) if all(map(np.array_equal, kind.ids, own.ids))]
        if not same:
            kinds.append(own)
        found.append(f".{same[0] if same else len(kinds) - 1}")
    return found


def _timing_batches(tokens: Sequence[Tokens], suffixes: Sequence[str]) -> list[dict[str, Array]]:
    """Batches of the same texts for every model, sorted by what the first one makes of them."""
    first = tokens[0]
    batches = []
    for at in timed_batches(first):
        batch: dict[str, Array] = {}
        for suffix, own in zip(suffixes, tokens, strict=True):
            if f"{INPUTS[0]}{suffix}" not in batch:
                arrays = pad([own.ids[i] for i in at], pad_id=own.pad_id, input_names=own.input_names)
                batch |= {f"{name}{suffix}": array for name, array in arrays.items()}
        batches.append(batch)
    return batches


def _answers(
    embedded: Sequence[Array],
    pool: TextData,
    test: TextData,
    drawn: Array,
    shots: Sequence[int],
    threads: int,
    progress: Progress,
) -> Array:
    """What every model [M] answers after so many shots [K] of each draw [S] to the test texts: classes [M, K, S, N]."""
    from threadpoolctl import threadpool_limits

    draws, num_classes, _ = drawn.shape
    progress.stage("Learning from shots", len(embedded) * len(shots) * draws)
    found = np.zeros((len(embedded), len(shots), draws, len(test)), np.int64)
    with threadpool_limits(threads):
        for s, k, m in np.ndindex(draws, len(shots), len(embedded)):
            places = drawn[s, :, : shots[k]]
            labels = np.repeat(np.arange(num_classes), shots[k])
            rows = embedded[m]
            found[m, k, s] = fit_and_answer(rows[places.ravel()], labels, rows[len(pool) :])
            progress.advance(1, f"draw {s + 1} of {draws}")
    return found


def _rows(
    answers: Array, labels: Array, called: Sequence[str], shots: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """A row per number of shots and model: each metric as a mean over draws, and what separates it from the first's."""
    models, numbers, draws, _ = answers.shape
    judged = judge(answers.reshape(models * numbers * draws, -1), labels, seed=seed)
    places = np.arange(models * numbers * draws).reshape(models, numbers, draws)
    rows = []
    for k, m in np.ndindex(numbers, models):
        own = {name: judged[name].take(places[m, k]) for name in METRICS}
        first = {name: judged[name].take(places[0, k]) for name in METRICS}
        apart = {name: over_draws(own[name].minus(first[name]), seed=seed) for name in METRICS} if m else None
        values = {name: over_draws(own[name], seed=seed) for name in METRICS}
        rows.append({"shots": shots[k], "model": called[m], **values, "difference": apart})
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch on so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
