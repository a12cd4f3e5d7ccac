"""One token policy for several tasks: the (s, q, l) of Qi et al. 2024 (arXiv:2408.11799), searched and judged.

Texts longer than s tokens lose, once l layers have run, the tokens that score below the q-quantile, but never so many
that fewer than s are left. Policies are chosen on one half of each task's test texts and reported on the other; and
each task is answered once more by the policy that the other tasks alone would have chosen.

Legend: N texts, C classes, D width.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown import registry
from paredown.anatomy import describe
from paredown.calibration import Batch
from paredown.cores import cores
from paredown.encoder import Encoder
from paredown.errors import BadData, ParedownError
from paredown.models import EMBEDDING, LoadedModel, load_model
from paredown.pipeline._memory import at_once, give_back_what_is_freed
from paredown.pipeline._policies import (
    FITTED_TOKENS,
    alternative_of,
    dense_alternative,
    described,
    special_ids,
    write_policy,
)
from paredown.pipeline._prepare import calibration_batches, describe_loaded, outputs_of, timing_batches
from paredown.pipeline._settings import DEFAULT_DROP, Progress, Silent
from paredown.pipeline._tokens import TIMED_TOKENS
from paredown.surgery import fold
from paredown.tasks import (
    Tokens,
    draw_shots,
    fit_and_answer,
    intent_parts,
    pool_and_test,
    text_classification,
    tokenize,
    unit_rows,
)
from paredown.tokens import Packed, count, fit
from paredown.types import Anatomy, Array, TokenPolicy, TokenStage, canonical_json, finite
from paredown.validation.machine import card
from paredown.validation.shots import judge, over_draws
from paredown.validation.timing import measure, ratio

PUBLISHED = (15, 0.8, 1)  # Qi et al., for MiniLM-L12
TESTED_TEXTS, TESTED_TOKENS = 2000, 400_000  # of a task's test texts at most, half to choose by and half to report
CAUTION = 0.84  # standard errors on top of a drop that is chosen by: of many policies the best-looking one was lucky
ROUNDS, SECONDS = 7, 20.0  # of timing, for each task


@dataclass(frozen=True)
class SearchSettings:
    """The grid: at least `least` tokens stay (s), those below a `quantile` go (q), `after` so many layers (l)."""

    least: tuple[int, ...] = (15, 32, 64, 128)
    quantile: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    after: tuple[int, ...] = (1, 2, 3)
    scorer: str = "attention"
    max_drop: float = DEFAULT_DROP
    shots: int = 10
    seeds: int = 3
    target: str = "torch"

    def __post_init__(self) -> None:
        registry.find("tokens", self.scorer)
        if not self.least or not self.quantile or not self.after:
            raise ParedownError("The grid is empty: name at least one s, one q and one l.")
        if min(self.least) < 1 or min(self.after) < 1 or not all(0 < q < 1 for q in self.quantile):
            raise ParedownError("s and l are 1 or more, and q lies between 0 and 1.")
        if self.shots < 1 or self.seeds < 1:
            raise ParedownError("shots and seeds are 1 or more.")

    def policy(self, s: int, q: float, l: int, special: Sequence[int]) -> TokenPolicy:  # noqa: E741 the paper's names
        stage = TokenStage(l, q)
        return TokenPolicy(self.scorer, (stage,), rule="quantile", least=s, special_ids=tuple(special))


@dataclass
class _Task:
    """Drawn texts and test texts of one task [N], their tokens, and the dense embeddings of all of them [N, D]."""

    name: str
    labels: Array
    num_classes: int
    shots: Array  # [seeds, C * shots]: places of the drawn texts
    tested: Array  # places of the test texts, the ones to choose by first
    tokens: Tokens
    dense: Array = field(default_factory=lambda: np.zeros(0))
    answers: Array = field(default_factory=lambda: np.zeros(0))  # of the dense model [seeds, tested]

    @property
    def chosen_by(self) -> slice:
        return slice(0, len(self.tested) // 2)

    @property
    def reported(self) -> slice:
        return slice(len(self.tested) // 2, None)


@dataclass(frozen=True)
class Opened:
    """A dense sentence encoder, with its exact folds."""

    loaded: LoadedModel
    anatomy: Anatomy
    encoder: Encoder


def search_tokens(
    model: str,
    tasks: Sequence[str],
    settings: SearchSettings | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The cheapest (s, q, l) whose few-shot accuracy falls by at most `max_drop` on every task, with most of a standard
    error to spare; per task, the drop and the time of texts longer than s, and the same for the policy that the other
    tasks alone choose; and the published configuration as it is. `tasks` are labelled files; a file of intents
    (CLINC150) has its own test texts.

    Classifiers are learnt on embeddings of the policy that they are used with. When none of the grid is good enough,
    `accepted` is false, what is reported is the one that loses least, and nothing is written into `out`.
    """
    settings, progress = settings or SearchSettings(), progress or Silent()
    if len(tasks) < 2:
        raise ParedownError(
            "Give two tasks at least, separated by commas: a policy is judged on tasks it has not seen."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or cores())
    try:
        progress.stage("Reading model and tasks")
        loaded = load_model(model, task=EMBEDDING)
        loaded = replace(loaded, max_length=min(loaded.max_length, max_length or loaded.max_length))
        folded, _ = fold(loaded.model, describe_loaded(loaded, loaded.model))
        anatomy = describe(folded, task=loaded.task, pooling=loaded.pooling, normalize=loaded.normalize)
        opened = Opened(loaded, anatomy, Encoder(folded, anatomy.layout))
        columns = {"text_column": text_column, "label_column": label_column}
        read = [_read(path, opened, settings, columns, seed) for path in tasks]
        with tempfile.TemporaryDirectory() as folder:
            found = _Search(opened, settings, read, seed, threads, Path(folder), progress).run(out)
        facts = {"model": model, "scorer": settings.scorer, "shots": settings.shots, "seeds": settings.seeds}
        facts |= {"max_drop": settings.max_drop, "target": settings.target, **found, "machine": card()}
        plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
        return plain
    finally:
        torch.set_num_threads(before)


def _read(path: str, opened: Opened, settings: SearchSettings, columns: Mapping[str, str | None], seed: int) -> _Task:
    data, names = text_classification.load_named(path, **columns)  # type: ignore[arg-type]
    own_test = "test" in intent_parts(path)
    test = text_classification.load_named(path, **columns, known=names, part="test")[0] if own_test else None
    pool, test, _ = pool_and_test(data, test, seed=seed)
    assert pool.labels is not None and test.labels is not None
    few = int(np.bincount(pool.labels, minlength=len(names)).min())
    if few < settings.shots:
        raise BadData(f"{path}: {settings.shots} shots were asked for, and a label has {few} texts to draw from.")
    shots = [draw_shots(pool.labels, len(names), settings.shots, seed=(seed, i)).ravel() for i in range(settings.seeds)]
    drawn = np.unique(np.concatenate(shots))
    order = np.random.default_rng(seed).permutation(len(test))[:TESTED_TEXTS]
    asked = tokenize(
        opened.loaded.tokenizer,
        [test.texts[i] for i in order],
        max_length=opened.loaded.max_length,
        input_names=opened.encoder.input_names,
    )
    order = order[: max(16, int(np.searchsorted(np.cumsum(asked.lengths), TESTED_TOKENS)))]
    texts = [*(pool.texts[i] for i in drawn), *(test.texts[i] for i in order)]
    tokens = tokenize(
        opened.loaded.tokenizer,
        texts,
        max_length=opened.loaded.max_length,
        input_names=opened.encoder.input_names,
    )
    return _Task(
        name=Path(path).stem if Path(path).stem not in ("train", "data_full") else Path(path).parent.name,
        labels=np.concatenate([pool.labels[drawn], test.labels[order]]),
        num_classes=len(names),
        shots=np.stack([np.searchsorted(drawn, one) for one in shots]),
        tested=len(drawn) + np.arange(len(order)),
        tokens=tokens,
    )


class _Search:
    """One search: what is known of each policy is kept, so that leaving a task out costs what it alone needs."""

    def __init__(
        self,
        opened: Opened,
        settings: SearchSettings,
        tasks: Sequence[_Task],
        seed: int,
        threads: int | None,
        folder: Path,
        progress: Progress,
    ):
        self.opened, self.settings, self.tasks, self.seed = opened, settings, tasks, seed
        self.threads, self.folder, self.progress = threads, folder, progress
        self.special = special_ids(opened.loaded.tokenizer)
        layers = len(opened.encoder.layers)
        afters = [after for after in settings.after if after < layers]
        if not afters:
            raise ParedownError(f"The model has {layers} layers, so tokens can go after 1 to {layers - 1} of them.")
        self.grid = list(itertools.product(settings.least, settings.quantile, afters))
        self.trained = "gate" in registry.find("tokens", settings.scorer).NEEDS
        self._answers: dict[tuple[TokenPolicy, int, tuple[int, ...], int], Array] = {}
        self._learnt: dict[tuple[int, tuple[int, ...]], dict[str, Tensor]] = {}

    def run(self, out: str | Path | None) -> dict[str, Any]:
        self.progress.stage("Embedding by the dense model", len(self.tasks))
        for task in self.tasks:
            task.dense = unit_rows(outputs_of(self.opened.encoder, task.tokens))
            task.answers = _answered(task, task.dense, task.tested)
            self.progress.advance(note=task.name)
        everyone = tuple(range(len(self.tasks)))
        self.progress.stage("Searching", len(everyone) + 1)
        best = self._cheapest(everyone)
        self.progress.advance()
        accepted = best is not None
        best = best or self._closest(everyone)
        left_out = []
        for i in everyone:
            others = tuple(j for j in everyone if j != i)
            found = self._cheapest(others)
            row: dict[str, Any] = {"task": self.tasks[i].name, "policy": None}
            if found is not None:
                row |= {"policy": _named(found), **self._told(i, found, others)}
            left_out.append(row)
            self.progress.advance(note=f"without {self.tasks[i].name}")
        rows = []
        for i in everyone:
            self.progress.stage(f"Timing {self.tasks[i].name}, interleaved", ROUNDS)
            rows.append({"task": self.tasks[i].name, **self._about(i, best), **self._compared(i, best, everyone)})
        s, q, l = best  # noqa: E741
        packed = self._packed(best, everyone)
        if out is not None and accepted:
            write_policy(Path(out), packed)
        worst = max(row["drop"].value for row in rows)
        verdict = (
            f"s = {s}, q = {q:g}, l = {l}: {100 * worst:.2f} points lost at most, on texts that it was not chosen by."
        )
        if not accepted:
            lost = {self.tasks[i].name: self._drop(i, best, everyone) for i in everyone}
            most = max(lost, key=lambda name: lost[name])
            verdict = (
                f"No policy of the grid stays within {self.settings.max_drop:.1%} on every task. s = {s}, q = {q:g}, "
                f"l = {l} loses least: {100 * lost[most]:.2f} points on {most}, on the texts to choose by. Allow more, "
                "or try a smaller q, a larger s or another scorer."
            )
        tried = [
            {
                **_named(one),
                "cost": self._cost(one, everyone),
                "drops": [self._drop(i, one, everyone) for i in everyone],
            }
            for one in self.grid
            if all(self._known(i, one, everyone) for i in everyone)
        ]
        return {
            "accepted": accepted,
            "policy": packed.policy if accepted else None,
            "chosen": _named(best),
            "published": _named(PUBLISHED),
            "tasks": rows,
            "left_out": left_out,
            "tried": tried,
            "verdict": verdict,
        }

    def _cheapest(self, fold: tuple[int, ...]) -> tuple[int, float, int] | None:
        """Of the grid, the policy that leaves fewest tokens to compute and stays within the drop on these tasks.

        From the cheapest on; what drops more tokens than one that failed is taken to fail too.
        """
        failed: list[tuple[int, float, int]] = []
        for one in sorted(self.grid, key=lambda one: self._cost(one, fold)):
            if any(one[0] <= s and one[1] >= q and one[2] <= after for s, q, after in failed):
                continue
            if all(self._bound(i, one, fold) <= self.settings.max_drop for i in fold):
                return one
            failed.append(one)
        return None

    def _closest(self, fold: tuple[int, ...]) -> tuple[int, float, int]:
        """Of those tried on all of these tasks, and the most careful ones, the policy with the least worst drop."""
        careful = sorted(self.grid, key=lambda one: self._cost(one, fold))[-3:]
        known = [one for one in self.grid if all(self._known(i, one, fold) for i in fold)]
        return min([*known, *careful], key=lambda one: max(self._bound(i, one, fold) for i in fold))

    def _cost(self, one: tuple[int, float, int], fold: tuple[int, ...]) -> float:
        """Tokens times layers that are left, as a share of all, mean over tasks: what the order of trying goes by."""
        policy, layers = self._policy(one), len(self.opened.encoder.layers)
        after = policy.stages[0].after
        shares = []
        for i in fold:
            lengths = self.tasks[i].tokens.lengths
            left = [n if n <= policy.least else count(policy, policy.stages[0], int(n)) for n in lengths]
            shares.append((after * lengths.sum() + (layers - after) * np.sum(left)) / (layers * lengths.sum()))
        return float(np.mean(shares))

    def _policy(self, one: tuple[int, float, int]) -> TokenPolicy:
        return self.settings.policy(*one, self.special)

    def _packed(self, one: tuple[int, float, int], fold: tuple[int, ...]) -> Packed:
        """With what the scorer has learnt from the drawn texts of the tasks in the fold."""
        policy = self._policy(one)
        key = policy.stages[0].after, fold
        if self.trained and key not in self._learnt:
            batches: list[Batch] = []
            for i in fold:
                task = self.tasks[i]
                drawn = task.tokens.take(np.unique(task.shots))
                batches += calibration_batches(drawn, most_tokens=FITTED_TOKENS // len(fold))
            self._learnt[key] = fit(self.opened.encoder, policy, batches, seed=self.seed)
        return Packed(self.opened.encoder, policy, self._learnt.get(key))

    def _known(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...]) -> bool:
        return self._key(i, one, fold, self.tasks[i].chosen_by) in self._answers

    def _key(
        self, i: int, one: tuple[int, float, int], fold: tuple[int, ...], part: slice
    ) -> tuple[TokenPolicy, int, tuple[int, ...], int]:
        return self._policy(one), i, fold if self.trained else (), part.start

    def _answer(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...], part: slice) -> Array:
        """Answers to a part of a task's test texts [seeds, N], learnt and asked by embeddings of this policy."""
        key = self._key(i, one, fold, part)
        if key not in self._answers:
            task = self.tasks[i]
            tested = task.tested[part]
            asked = np.concatenate([np.unique(task.shots), tested])
            long = asked[task.tokens.lengths[asked] > one[0]]
            if len(long):  # the others are as they were
                embeddings = task.dense.copy()
                embeddings[long] = unit_rows(outputs_of(self._packed(one, fold), task.tokens.take(long)))
                self._answers[key] = _answered(task, embeddings, tested)
            else:
                self._answers[key] = task.answers[:, part]
            give_back_what_is_freed()
            self.progress.advance(0, note=f"{task.name}: s {one[0]}, q {one[1]:g}, l {one[2]}")
        return self._answers[key]

    def _drop(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...]) -> float:
        """In few-shot accuracy, on the texts to choose by."""
        return float(self._lost(i, one, fold).mean())

    def _bound(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...]) -> float:
        """What the drop may well be: CAUTION standard errors above what it is on these texts."""
        lost = self._lost(i, one, fold)
        return float(lost.mean() + CAUTION * lost.std() / np.sqrt(len(lost)))

    def _lost(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...]) -> Array:
        """Of each text to choose by, how much oftener the dense model's answer is right, over the draws [N]."""
        task, part = self.tasks[i], self.tasks[i].chosen_by
        right = task.labels[task.tested[part]]
        ours, theirs = task.answers[:, part] == right, self._answer(i, one, fold, part) == right
        lost: Array = ours.mean(0) - theirs.mean(0)
        return lost

    def _told(self, i: int, one: tuple[int, float, int], fold: tuple[int, ...]) -> dict[str, Any]:
        """Accuracy of the dense model and of the policy on the texts to report, and the drop with its interval."""
        task, part = self.tasks[i], self.tasks[i].reported
        labels = task.labels[task.tested[part]]
        answers = np.concatenate([task.answers[:, part], self._answer(i, one, fold, part)])
        judged, draws = judge(answers, labels, seed=self.seed)["accuracy"], len(task.answers)
        dense, pruned = judged.take(np.arange(draws)), judged.take(np.arange(draws, 2 * draws))
        return {
            "dense": over_draws(dense, seed=self.seed),
            "pruned": over_draws(pruned, seed=self.seed),
            "drop": over_draws(dense.minus(pruned), seed=self.seed),
            "samples": len(labels),
        }

    def _about(self, i: int, one: tuple[int, float, int]) -> dict[str, Any]:
        lengths = self.tasks[i].tokens.lengths
        return {"mean_tokens": float(lengths.mean()), "longer_than_s": float((lengths > one[0]).mean())}

    def _compared(self, i: int, best: tuple[int, float, int], fold: tuple[int, ...]) -> dict[str, Any]:
        """The chosen policy and the published one: accuracy, and the time of texts longer than s against the dense."""
        found = self._told(i, best, fold)
        lengths = self.tasks[i].tokens.lengths
        known = PUBLISHED[2] < len(self.opened.encoder.layers)
        ways = {"chosen": best, **({"published": PUBLISHED} if known else {})}
        for name, one in ways.items():
            long = np.flatnonzero(lengths > one[0])
            told = found if name == "chosen" else self._told(i, one, fold)
            told["time"] = self._time(one, self.tasks[i].tokens.take(long), fold) if len(long) >= 8 else None
            if name == "published":
                found["published"] = told
        return found

    def _time(self, one: tuple[int, float, int], tokens: Tokens, fold: tuple[int, ...]) -> Any:
        """Embedding time as a share of the dense model's, of texts sorted by length, with its interval."""
        packed, target = self._packed(one, fold), self.settings.target
        batches, _ = timing_batches(tokens, most_tokens=TIMED_TOKENS)
        alternatives = [
            dense_alternative(self.opened, target, self.folder),
            alternative_of(packed, described(packed.policy), self.opened, target, self.folder),
        ]
        timings = measure(
            alternatives,
            batches,
            rounds=ROUNDS,
            threads=self.threads,
            seconds=SECONDS,
            together=at_once(self.opened.encoder.model),
            progress=lambda done, of: self.progress.advance(ROUNDS / of / 2),
        )
        return ratio(timings[alternatives[1].name], timings["dense"])


def _answered(task: _Task, embeddings: Array, tested: Array) -> Array:
    """To the texts at the places `tested` [seeds, N]."""
    learnt = [fit_and_answer(embeddings[places], task.labels[places], embeddings[tested]) for places in task.shots]
    return np.stack(learnt)


def _named(one: tuple[int, float, int]) -> dict[str, Any]:
    return dict(zip(("s", "q", "l"), one, strict=True))
