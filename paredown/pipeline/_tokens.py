"""Which tokens to leave out while a model runs: policies tried side by side, and the length from which they pay.

Everything here is judged on the guardrail texts; the test split stays closed. All policies are judged on some of the
texts first; then, from the fastest on, those that might pass on all of them, until one does.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown import registry
from paredown.cores import cores
from paredown.errors import ParedownError, UnsupportedModel
from paredown.network import Forward
from paredown.pipeline._candidates import BASELINE, Candidate
from paredown.pipeline._gate import Judged, as_row
from paredown.pipeline._memory import at_once, give_back_what_is_freed
from paredown.pipeline._policies import (
    FITTED_TOKENS,
    alternative_of,
    dense_alternative,
    described,
    read_policy,
    special_ids,
    switched_off,
    write_policy,
)
from paredown.pipeline._prepare import (
    Prepared,
    affordable,
    calibration_batches,
    outputs_of,
    prepare,
    timing_batches,
)
from paredown.pipeline._settings import DEFAULT_DROP, Progress, Silent
from paredown.pipeline._study_settings import StudySettings
from paredown.surgery import parameters
from paredown.targets.torch import autocast, check_precision
from paredown.tokens import Packed, fit
from paredown.types import Array, TokenPolicy, TokenStage, canonical_json, finite
from paredown.validation.machine import card
from paredown.validation.quality import Drop, paired_drop, passes
from paredown.validation.timing import Timing, measure, ratio

ROUNDS = 9
SECONDS = 10.0  # of timing for each policy at most
TIMED_TOKENS = 16_000  # in batches: where texts are long, padding decides too, and two batches would be chance
JUDGED_TOKENS = 1_000_000  # of guardrail texts, where a first look says that a policy may pass


@dataclass(frozen=True)
class TokenSettings:
    """What policies are tried: every scorer with every depth and share.

    `after` are layers, or below 1 shares of them, and several together for a policy of several stages, each of which
    keeps `keep` of what is left; `keep` is read by the `rule` (see `TokenPolicy`). With `precision`
    "bf16" they run in bfloat16, and are judged so against the dense model in float32.
    """

    scorers: tuple[str, ...] = ("learned", "norm")
    after: tuple[float | tuple[float, ...], ...] = (0.17, 0.33, 0.5)
    keep: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    rule: str = "ratio"
    action: str = "drop"
    least: int = 1
    exit: bool = False
    max_drop: float = DEFAULT_DROP
    confidence: float = 0.9
    target: str = "torch"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in self.scorers:
            registry.find("tokens", name)
        if not self.scorers or not self.after or not self.keep:
            raise ParedownError("There is nothing to try: name a scorer, a depth and a share.")
        if not all(0 < one < 1 or (one >= 1 and one == int(one)) for depth in self.after for one in _together(depth)):
            raise ParedownError("A depth is a share of the layers above 0 and below 100%, or a number of them.")
        if self.rule != "threshold" and not all(0 < one <= 1 for one in self.keep):
            raise ParedownError("A share that is kept is above 0 and at most 1, such as 0.6.")
        if self.target not in ("torch", "onnxruntime", "openvino"):
            raise ParedownError(f"There is no target {self.target!r}; choose torch, onnxruntime or openvino.")
        if self.precision != "fp32" and self.target != "torch":
            raise ParedownError(f"Policies are tried in {self.precision} on torch only.")
        check_precision(self.precision)

    def policies(self, layers: int, special_ids: Sequence[int]) -> list[TokenPolicy]:
        """All of them for a model of so many layers, careful ones first."""
        depths = sorted({_rising(depth, layers) for depth in self.after})
        scorers = self.scorers if self.action == "drop" else self.scorers[:1]  # merging asks no scorer
        found = []
        for scorer, depth, keep in itertools.product(scorers, reversed(depths), sorted(set(self.keep), reverse=True)):
            found.append(
                TokenPolicy(
                    scorer,
                    tuple(TokenStage(after, keep) for after in depth),
                    rule=self.rule,
                    action=self.action,
                    least=self.least,
                    exit=self.exit,
                    special_ids=tuple(special_ids),
                )
            )
        return found


def _together(depth: float | tuple[float, ...]) -> tuple[float, ...]:
    return depth if isinstance(depth, tuple) else (depth,)


def _rising(depth: float | tuple[float, ...], layers: int) -> tuple[int, ...]:
    """After which layers the stages come, of so many."""
    found = {round(one if one >= 1 else one * layers) for one in _together(depth)}
    return tuple(sorted({min(layers - 1, max(1, one)) for one in found}))


def sweep_tokens(
    asked: StudySettings,
    tokens: TokenSettings | None = None,
    *,
    policy: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every policy with its quality on the guardrail texts and its speed: `candidates`, as in a run's report.

    The fastest that passes is `chosen`; it is written into the folder `out` with what it has learnt, and switched off
    below the length where it was measured to pay. Quality of an embedder is the accuracy of a linear classifier on the
    dense embeddings where the data has labels, otherwise the cosine to the dense model. Speed is on the target, against
    its dense model as anybody would run it, in batches sorted by length.

    `policy` is such a folder: that one policy is tried as it is, on other texts perhaps.
    """
    tokens, progress = tokens or TokenSettings(), progress or Silent()
    before = torch.get_num_threads()
    torch.set_num_threads(asked.threads or cores())
    try:
        progress.stage("Reading model and data")
        settings = replace(asked.settings(), max_drop=tokens.max_drop, confidence=tokens.confidence)
        prepared = prepare(settings, probed=True, judged_tokens=JUDGED_TOKENS)
        if prepared.generates:
            raise UnsupportedModel("tokens are dropped from text encoders; a language model needs all of them to go on")
        if policy is None:
            tried = _fitted(tokens, prepared, asked.seed, progress)
        else:
            tried = [read_policy(policy, prepared.encoder)]
        with tempfile.TemporaryDirectory() as folder:
            facts, best = _swept(asked, tokens, prepared, tried, Path(folder), progress)
            if best is not None and policy is None:
                best, curve = switched_off(
                    best, prepared, tokens.target, Path(folder), asked.threads, progress, precision=tokens.precision
                )
                facts |= {"policy": best.policy, "lengths": curve}
                if out is not None:
                    write_policy(Path(out), best)
        facts["verdict"] = _verdict(facts)
        plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
        return plain
    finally:
        torch.set_num_threads(before)


def _fitted(settings: TokenSettings, prepared: Prepared, seed: int, progress: Progress) -> list[Packed]:
    """The policies of the settings, with what they learn from calibration texts."""
    policies = settings.policies(len(prepared.encoder.layers), special_ids(prepared.loaded.tokenizer))
    batches = calibration_batches(prepared.calibration, most_tokens=FITTED_TOKENS)
    progress.stage("Fitting policies", len(policies))
    found = []
    known: dict[tuple[object, ...], dict[str, Tensor]] = {}
    for policy in policies:
        # a gate depends on where it stands, not on how many tokens it lets through
        key = (policy.scorer, *(s.after for s in policy.stages), *(policy.stages if policy.exit else ()))
        if key not in known:
            known[key] = fit(prepared.encoder, policy, batches, seed=seed)
            give_back_what_is_freed()
        found.append(Packed(prepared.encoder, policy, known[key]))
        progress.advance(note=described(policy))
    return found


def _swept(
    asked: StudySettings,
    settings: TokenSettings,
    prepared: Prepared,
    packed: Sequence[Packed],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Any], Packed | None]:
    """The facts, and the policy that was chosen."""
    judge = _Judge(prepared, settings, asked.seed)
    progress.stage(f"Judging policies on {judge.few} guardrail texts", len(packed) + 1)
    judge.begin()
    progress.advance(note="dense")
    drops = []
    for one in packed:
        drops.append(judge.drop(one, judge.few))
        progress.advance(note=described(one.policy))

    timings, names = _timed(asked, settings, prepared, packed, folder, progress)
    dense, size = timings["dense"], parameters(prepared.model)
    about: dict[str, Any] = {"target": settings.target, "alternative": None, "parameters": size}
    lower = {**about, "precision": settings.precision}
    verdicts = []
    for name, drop in zip(names, drops, strict=True):
        candidate = Candidate(name, "tokens", **lower, eligible=True)
        passed = passes(drop, settings.max_drop)
        verdicts.append(Judged(candidate, timings[name], ratio(dense, timings[name]), drop, passed))
    fastest = sorted(range(len(packed)), key=lambda i: verdicts[i].seconds)
    best = None
    if judge.few < judge.all:
        promising = [i for i in fastest if drops[i].dense - drops[i].pruned <= settings.max_drop]
        progress.stage(f"Judging the fastest on all {judge.all}", len(promising))
        for i in promising:
            drop = judge.drop(packed[i], judge.all)
            verdicts[i] = replace(verdicts[i], drop=drop, passed=passes(drop, settings.max_drop))
            progress.advance(note=names[i])
            if verdicts[i].passed:
                best = i
                break
    else:
        best = next((i for i in fastest if verdicts[i].passed), None)

    rows = [as_row(Judged(Candidate("dense", BASELINE, **about, precision="fp32"), dense, ratio(dense, dense)), dense)]
    if "unpadded" in timings:
        note = "exact: no layer computes on padding" if settings.precision == "fp32" else "no layer computes on padding"
        exact = Candidate("unpadded", "folded", **lower, note=note)
        rows.append(as_row(Judged(exact, timings["unpadded"], ratio(dense, timings["unpadded"])), dense))
    for i, verdict in enumerate(verdicts):
        on = 0 if verdict.drop is None else verdict.drop.samples
        rows.append({**as_row(verdict, dense), "chosen": i == best, "policy": packed[i].policy, "samples": on})
    told = drops[0] if best is None else verdicts[best].drop
    assert told is not None
    facts = {
        "model": asked.model,
        "task": prepared.task.NAME,
        "family": prepared.anatomy.family,
        "target": settings.target,
        "quality_metric": told.metric,
        "quality_dense": told.dense,
        "objective": {"dial": "max_drop", "value": settings.max_drop, "max_drop": settings.max_drop},
        "confidence": settings.confidence,
        "samples": judge.all if best is not None or judge.few == judge.all else judge.few,
        "mean_tokens": float(prepared.guardrail.lengths.mean()),
        "rounds": len(dense.offline_seconds),
        "accepted": best is not None,
        "candidates": rows,
        "policy": None if best is None else packed[best].policy,
        "notes": list(prepared.notes),
        "machine": card(),
    }
    return facts, None if best is None else packed[best]


class _Judge:
    """Drops of policies on guardrail texts, on a `few` or on `all` of them; what was run once is not run again."""

    def __init__(self, prepared: Prepared, settings: TokenSettings, seed: int):
        self._prepared, self._settings, self._seed = prepared, settings, seed
        self._network = prepared.network
        self._data = prepared.splits.guardrail
        self.all = len(self._data)
        self._owner = np.arange(len(prepared.guardrail)) % self.all  # partners come after the texts
        self.few = affordable(prepared.guardrail, owner=self._owner)
        self._known: dict[Forward, tuple[Array, Array]] = {}  # which rows are known [rows], and what they are

    def begin(self) -> None:
        """Runs the dense model on the few."""
        self._outputs(self._network, self.few)

    def drop(self, packed: Packed, count: int) -> Drop:
        dense, pruned = (self._outputs(network, count) for network in (self._network, packed))
        confidence, data = self._settings.confidence, self._data.take(np.arange(count))
        return paired_drop(self._prepared.task, dense, pruned, data, confidence=confidence, seed=self._seed)

    def _outputs(self, network: Forward, count: int) -> Array:
        tokens = self._prepared.guardrail
        rows = np.flatnonzero(self._owner < count)
        done, values = self._known.get(network, (np.zeros(len(tokens), bool), np.zeros(0)))
        missing = rows[~done[rows]]
        if len(missing):
            with autocast("fp32" if network is self._network else self._settings.precision):
                found = outputs_of(network, tokens.take(missing))
            values = values if len(values) else np.zeros((len(tokens), *found.shape[1:]), found.dtype)
            values[missing], done[missing] = found, True
            self._known[network] = done, values
        return values[rows]


def _verdict(facts: Mapping[str, Any]) -> str:
    one = next((row for row in facts["candidates"] if row.get("chosen")), None)
    if one is None:
        return "No policy passed: keep more tokens, drop them later, give more texts, or allow a larger drop."
    if one["speedup"].value <= 1:
        return f"Drop no tokens: {one['name']} passes, but is not faster on these texts."
    off = facts["policy"].off_below
    short = f" Texts of up to {off} tokens keep all: there it does not pay." if off else ""
    return f"Use {one['name']}: {one['speedup'].value:.2f} times the texts per second.{short}"


def _timed(
    asked: StudySettings,
    settings: TokenSettings,
    prepared: Prepared,
    packed: Sequence[Packed],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Timing], list[str]]:
    """Timings of "dense", of "unpadded" on torch, and of every policy by the name that it goes by."""
    lower = "" if settings.precision == "fp32" else f", {settings.precision}"
    names = [described(one.policy) + lower for one in packed]
    progress.stage("Preparing for the target", len(packed))
    alternatives = [dense_alternative(prepared, settings.target, folder)]
    if settings.target == "torch":
        alternatives.append(alternative_of(None, "unpadded", prepared, "torch", folder, settings.precision))
    for name, one in zip(names, packed, strict=True):
        alternatives.append(alternative_of(one, name, prepared, settings.target, folder, settings.precision))
        progress.advance()
    progress.stage(f"Timing {len(alternatives)} ways, interleaved", ROUNDS)
    batches, singles = timing_batches(prepared.guardrail, most_tokens=TIMED_TOKENS)
    found = measure(
        alternatives,
        batches,
        singles=singles,
        rounds=ROUNDS,
        threads=asked.threads,
        seconds=SECONDS * len(alternatives),
        together=at_once(prepared.model),
        progress=lambda done, of: progress.advance(ROUNDS / of),
    )
    return found, names
