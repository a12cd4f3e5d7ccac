"""Making small sentence encoders: trained on pairs, or distilled from a deeper one into fewer layers.

Both end in a plain sentence-transformers folder, which `load_model`, and with it every other verb, opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paredown import __version__
from paredown.cores import cores
from paredown.errors import BadData, ParedownError
from paredown.files import replacing
from paredown.pipeline._embedder_figures import (
    SentenceEncoder,
    against_teacher,
    check_same,
    figures,
    open_encoder,
    speed,
)
from paredown.pipeline._examples import PARTNERS, Examples, Parts, alike, columns_to_learn, divided, read
from paredown.pipeline._memory import give_back_what_is_freed, map_large_blocks
from paredown.pipeline._settings import Progress, Silent
from paredown.pipeline._work import Work
from paredown.recovery import Course, Lesson, check_installed, fit_embedder
from paredown.recovery.distill import learning_rate, teach
from paredown.surgery import cut, parameters
from paredown.targets import huggingface
from paredown.types import Anatomy, Plan, canonical_json, finite
from paredown.validation.machine import card

REPORT = "embedder.json"
MINUTES = 10.0
CONTRAST_RATE = 5e-5
PROMPTS = "config_sentence_transformers.json"


@dataclass(frozen=True)
class EmbedderSettings:
    """One training of a sentence encoder. At most one of `steps`, `epochs` and `minutes` is set, or it is 10 minutes.

    `layers` (so many, evenly spread) or `keep_layers` (by number, from 0) are what a student keeps of its teacher.
    Pairs with scores are learnt from `minimum_score` on, by default 80 % of the highest. The columns are those of both
    files; `eval_text_column`, and to distil `pair_column` and `score_column`, are those of `eval` where there is one.
    """

    model: str
    data: str
    out: str
    eval: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    negative_column: str | None = None
    label_column: str | None = None
    score_column: str | None = None
    eval_text_column: str | None = None
    minimum_score: float | None = None
    layers: int | None = None
    keep_layers: tuple[int, ...] = ()
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 64
    learning_rate: float | None = None
    max_length: int | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.minutes)) > 1:
            raise ParedownError("Say how long to train in one way: steps, epochs or minutes.")
        if self.layers is not None and self.keep_layers:
            raise ParedownError("Say how many layers stay, or which ones, not both.")
        checks = (
            (self.steps is None or self.steps >= 1, "steps is 1 or more"),
            (self.epochs is None or 0 < self.epochs < math.inf, "epochs is a number above 0"),
            (self.minutes is None or 0 < self.minutes < math.inf, "minutes is a time above 0"),
            (self.layers is None or self.layers >= 1, "layers is 1 or more"),
            (self.batch_size >= 2, "batch_size is 2 or more"),
            (self.learning_rate is None or 0 < self.learning_rate < 1, "learning_rate is above 0 and below 1"),
            (self.max_length is None or self.max_length >= 4, "max_length is 4 tokens or more"),
            (self.threads is None or self.threads >= 1, "threads is 1 or more"),
        )
        for fine, sentence in checks:
            if not fine:
                raise ParedownError(f"{sentence}.")

    def course(self, rate: float, *, epoch: float = 1.0) -> Course:
        """How it is learnt: `rate` is the default rate, `epoch` the share of the rows that is a round through texts."""
        minutes = MINUTES if self.steps is None and self.epochs is None and self.minutes is None else self.minutes
        epochs = None if self.epochs is None else self.epochs * epoch
        return Course(self.learning_rate or rate, self.batch_size, self.steps, epochs, minutes, self.seed)


def train_embedder(settings: EmbedderSettings, progress: Progress | None = None) -> dict[str, Any]:
    """The facts of a sentence encoder trained on pairs, written to `settings.out`.

    Data are pairs of texts (with hard negatives, or scores), or texts with labels, of which pairs are drawn. A tenth of
    the rows tests it before and after, unless `eval` does; another tenth, never `eval`, picks the best state.
    """
    if settings.layers is not None or settings.keep_layers:
        raise ParedownError("Layers are left out by distillation: take embedder distill.")
    progress = progress or Silent()
    with _opened(settings, progress) as model:
        columns = {name: getattr(settings, f"{name}_column") for name in ("text", "pair", "negative", "label", "score")}
        data = read(settings.data, columns)
        scored = replace(data, notes=())
        columns |= {"text": settings.eval_text_column or settings.text_column}
        tested = read(settings.eval, columns) if settings.eval else None
        _check_related(scored, settings.data)
        if tested is not None:
            _check_related(tested, str(settings.eval))
        data = alike(data, settings.data, settings.minimum_score)
        parts = divided(data, tested, path=settings.data, seed=settings.seed)
        if tested is None and scored.scores is not None:
            parts = _with_scores(parts, scored)
        many = 1 if parts.learnt.labels is None else PARTNERS
        learnt = columns_to_learn(parts.learnt, partners=many, seed=settings.seed)
        held = columns_to_learn(parts.judged, partners=1, seed=settings.seed)
        epoch = len(parts.learnt) / len(learnt["anchor"])
        return _run(
            settings,
            progress,
            model,
            parts,
            kept=model.anatomy.identity()["layers"],
            lesson=lambda _: Lesson("contrast", learnt, held),
            course=settings.course(CONTRAST_RATE, epoch=epoch),
        )


def distill_embedder(settings: EmbedderSettings, progress: Progress | None = None) -> dict[str, Any]:
    """The facts of a student with fewer layers that learnt its teacher's embeddings, written to `settings.out`.

    The student starts as some of the teacher's layers on the teacher's token embeddings, which stay as they are. Labels
    are not needed. A tenth of the rows tests it, unless `eval` does, against the teacher and, where these rows are
    pairs with scores, against the scores.
    """
    progress = progress or Silent()
    with _opened(settings, progress) as model:
        kept = _kept(settings, model.anatomy)
        evaluated = {"pair": settings.pair_column, "score": settings.score_column}
        columns = {"text": settings.text_column, **({} if settings.eval else evaluated)}
        data = read(settings.data, columns, labelled=False)
        columns = {"text": settings.eval_text_column or settings.text_column, **evaluated}
        tested = read(settings.eval, columns, labelled=False) if settings.eval else None
        parts = divided(data, tested, path=settings.data, seed=settings.seed)
        texts = [part.every_text() for part in (parts.learnt, parts.judged)]

        def lesson(work: Work) -> Lesson:
            every = [text for part in texts for text in part]
            stored = work.tensors("teacher", lambda: {"wanted": _taught(model, every, progress)})["wanted"].numpy()
            learnt, held = np.split(stored, [len(texts[0])])
            sets = [{"text": list(part), "label": rows} for part, rows in zip(texts, (learnt, held), strict=True)]
            return Lesson("distill", sets[0], sets[1], frozen=model.anatomy.layout.embeddings)

        course = settings.course(learning_rate(model.anatomy.layout))
        return _run(settings, progress, model, parts, kept=kept, lesson=lesson, course=course, teacher=True)


@contextlib.contextmanager
def _opened(settings: EmbedderSettings, progress: Progress) -> Iterator[SentenceEncoder]:
    """The model, with torch on as many threads as asked for."""
    check_installed()
    _check_free(Path(settings.out).expanduser().resolve())
    map_large_blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or cores())
    try:
        progress.stage("Reading model and data")
        yield open_encoder(settings.model, settings.max_length)
    finally:
        torch.set_num_threads(before)


def _run(
    settings: EmbedderSettings,
    progress: Progress,
    model: SentenceEncoder,
    parts: Parts,
    *,
    kept: tuple[int, ...],
    lesson: Callable[[Work], Lesson],
    course: Course,
    teacher: bool = False,
) -> dict[str, Any]:
    for note in parts.notes:
        progress.say(note)
    out = Path(settings.out).expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Work(out, _key(settings, model, parts))
    if work.resumed:
        progress.say("Going on from where an earlier run with the same settings stopped.")
    if work.discarded:
        progress.say("What an unfinished run with other settings had left for this place is discarded.")
    start = work.path("start")
    if not start.exists():
        _write_start(model, kept, settings.model, start)
    taught = lesson(work)
    progress.stage("Getting ready to train")
    shown = 0

    def report(now: Any, steps: int) -> None:
        nonlocal shown
        if not shown:
            progress.stage("Training", steps)
        progress.advance(now.step - shown, f"step {now.step} of {steps}, best held-out loss {now.best:.4g}")
        shown = now.step

    best, checks = fit_embedder(start, taught, course, work.path("training"), report=report)
    if best == start:
        progress.say("Training made it no better on the held-out texts: the model is left as it was.")
    give_back_what_is_freed()
    progress.stage("Comparing before and after")
    before, after = open_encoder(str(start), None), open_encoder(str(best), None)
    check_same(after, best, parts.tested)
    found = against_teacher(model, before, after, parts.tested) if teacher else figures(before, after, parts.tested)
    facts: dict[str, Any] = {
        "verb": "distill" if teacher else "train",
        "model": settings.model,
        "out": settings.out,
        "layers": list(kept),
        "figures": found,
        "rows": {name: len(getattr(parts, name)) for name in ("learnt", "judged", "tested")},
        "steps": checks[-1].step,
        "minutes": work.minutes,
        "checks": [{"step": one.step, "loss": one.distance} for one in checks],
        "improved": best != start,
        "parameters_before": parameters(model.loaded.model),
        "parameters": parameters(after.loaded.model),
        "notes": list(parts.notes),
    }
    if teacher:
        facts |= speed(model, best, parts.tested, threads=settings.threads, seed=settings.seed, progress=progress)
    facts |= {"seed": settings.seed, "version": __version__, "machine": card()}
    facts["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    progress.stage("Writing the model")
    _write(best, out, plain, work)
    return plain


# ----------------------------------------------------------------------------------------------------- what goes in


def _kept(settings: EmbedderSettings, anatomy: Anatomy) -> tuple[int, ...]:
    """The numbers of the layers that stay, bottom-up."""
    depth = len(anatomy.identity()["layers"])
    if settings.keep_layers:
        found = tuple(sorted(set(settings.keep_layers)))
        if len(found) < len(settings.keep_layers) or found[0] < 0 or found[-1] >= depth:
            said = ",".join(str(one) for one in settings.keep_layers)
            raise ParedownError(f"--keep-layers {said}: the layers are 0 to {depth - 1}, each at most once.")
        return found
    if settings.layers is None:
        raise ParedownError("Say how many layers the student has (--layers), or which (--keep-layers).")
    if settings.layers > depth:
        raise ParedownError(f"The teacher has {depth} layers, so a student cannot keep {settings.layers} of them.")
    return evenly_spread(depth, settings.layers)


def evenly_spread(depth: int, count: int) -> tuple[int, ...]:
    """So many layers of `depth`, the last of them always: its output is what the pooling was trained on."""
    return tuple(int(i) for i in np.round(np.linspace(0, depth - 1, count) if count > 1 else [depth - 1]))


def _write_start(model: SentenceEncoder, kept: tuple[int, ...], source: str, folder: Path) -> None:
    """The folder that training starts from: the kept layers, as transformers and sentence-transformers open them."""
    loaded, anatomy = model.loaded, model.anatomy
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "layers": kept})
    small = cut(loaded.model, anatomy, plan)
    beside = folder.with_name("start.part")
    shutil.rmtree(beside, ignore_errors=True)
    huggingface.export(small, loaded.tokenizer, beside, anatomy=anatomy, plan=plan, max_length=loaded.max_length)
    theirs = Path(source).expanduser() / PROMPTS
    if theirs.is_file():  # how texts are to be prompted, and compared; none unasked, as here none is learnt with
        about = json.loads(theirs.read_text(encoding="utf-8")) | {"default_prompt_name": None}
        (beside / PROMPTS).write_text(json.dumps(about, indent=2), encoding="utf-8")
    os.replace(beside, folder)


def _taught(model: SentenceEncoder, texts: Sequence[str], progress: Progress) -> torch.Tensor:
    progress.stage("Embedding the texts with the teacher", len(texts))
    return teach(model.encoder, model.tokens(texts), progress=progress.advance)


def _check_related(data: Examples, path: str) -> None:
    if data.labels is None and data.partners is None:
        raise BadData(
            f"{path}: there are texts, but nothing that belongs together: a column of second texts (--pair-column) or "
            "of labels (--label-column) is needed."
        )


def _with_scores(parts: Parts, scored: Examples) -> Parts:
    """The same, tested on every scored pair, not on those alone that mean the same, that shares no text with others."""
    known = set().union(*parts.learnt.keys(), *parts.judged.keys())
    rows = [i for i, key in enumerate(scored.keys()) if known.isdisjoint(key)]
    return replace(parts, tested=scored.take(rows))


def _key(settings: EmbedderSettings, model: SentenceEncoder, parts: Parts) -> str:
    """Names a run by all that its result depends on: settings, texts, weights, versions, machine."""
    machine = card()
    nowhere = replace(settings, model="", data="", eval=None, out="")  # a file has many paths: what it holds counts
    texts = [part.every_text() for part in (parts.learnt, parts.judged, parts.tested)]
    about = [nowhere, __version__, machine["libraries"], machine["cpu"], machine["cores"], texts]
    found = hashlib.sha256(canonical_json(about).encode())
    for tensor in model.loaded.model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_free(out: Path) -> None:
    """Raises BadData before any work when the model could not be put there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadData(f"{out} exists and is not an empty folder; name another place with --out.")
    above = next(parent for parent in out.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadData(f"the model cannot be written to {out}: {above} is not a folder that may be written to")


def _write(best: Path, out: Path, facts: dict[str, Any], work: Work) -> None:
    """The folder, with the facts beside the model, in its place at once."""
    built = work.path("model")
    shutil.rmtree(built, ignore_errors=True)
    shutil.copytree(best, built)
    with replacing(built / REPORT) as beside:
        beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if out.is_dir():
        out.rmdir()
    os.replace(built, out)
    work.discard()
