"""Which tokens to leave out while a model runs: policies tried side by side, and the length from which they pay.

Everything here is judged on the guardrail texts; the test split stays closed.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from paredown import registry
from paredown.cores import cores
from paredown.errors import ParedownError, UnsupportedModel
from paredown.files import replacing
from paredown.pipeline._candidates import BASELINE, Candidate
from paredown.pipeline._gate import Judged, as_row
from paredown.pipeline._latency import at_once
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._policies import (
    FITTED_TOKENS,
    alternative_of,
    dense_alternative,
    described,
    special_ids,
    switched_off,
)
from paredown.pipeline._prepare import Prepared, calibration_batches, outputs_of, prepare, timing_batches
from paredown.pipeline._settings import DEFAULT_DROP, Progress, Silent
from paredown.pipeline._study import StudySettings
from paredown.surgery import parameters
from paredown.tokens import Packed, fit
from paredown.types import TokenPolicy, TokenStage, canonical_json, finite
from paredown.validation.machine import card
from paredown.validation.quality import paired_drop, passes
from paredown.validation.timing import Timing, measure, ratio

ROUNDS = 9
SECONDS = 10.0  # of timing for each policy at most
POLICY, TENSORS = "policy.json", "policy.safetensors"


@dataclass(frozen=True)
class TokenSettings:
    """What policies are tried: every scorer with every depth and share.

    `after` are layers, or below 1 shares of them; `keep` is read by the `rule` (see `TokenPolicy`).
    """

    scorers: tuple[str, ...] = ("learned", "norm")
    after: tuple[float, ...] = (0.17, 0.33, 0.5)
    keep: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    rule: str = "ratio"
    action: str = "drop"
    least: int = 1
    exit: bool = False
    max_drop: float = DEFAULT_DROP
    confidence: float = 0.9
    target: str = "torch"

    def __post_init__(self) -> None:
        for name in self.scorers:
            registry.find("tokens", name)
        if not self.scorers or not self.after or not self.keep:
            raise ParedownError("There is nothing to try: name a scorer, a depth and a share.")
        if not all(0 < one < 1 or (one >= 1 and one == int(one)) for one in self.after):
            raise ParedownError("A depth is a share of the layers above 0 and below 100%, or a number of them.")
        if self.rule != "threshold" and not all(0 < one <= 1 for one in self.keep):
            raise ParedownError("A share that is kept is above 0 and at most 1, such as 0.6.")
        if self.target not in ("torch", "onnxruntime", "openvino"):
            raise ParedownError(f"There is no target {self.target!r}; choose torch, onnxruntime or openvino.")

    def policies(self, layers: int, special_ids: Sequence[int]) -> list[TokenPolicy]:
        """All of them for a model of so many layers, careful ones first."""
        depths = sorted({min(layers - 1, max(1, round(one if one >= 1 else one * layers))) for one in self.after})
        scorers = self.scorers if self.action == "drop" else self.scorers[:1]  # merging asks no scorer
        found = []
        for scorer, depth, keep in itertools.product(scorers, reversed(depths), sorted(set(self.keep), reverse=True)):
            found.append(
                TokenPolicy(
                    scorer,
                    (TokenStage(depth, keep),),
                    rule=self.rule,
                    action=self.action,
                    least=self.least,
                    exit=self.exit,
                    special_ids=tuple(special_ids),
                )
            )
        return found


def sweep(
    asked: StudySettings,
    tokens: TokenSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every policy with its quality on the guardrail texts and its speed: `candidates`, as in a run's report.

    The fastest that passes is `chosen`; it is written into the folder `out` with what it has learnt, and switched off
    below the length where it was measured to pay. Quality of an embedder is the accuracy of a linear classifier on the
    dense embeddings where the data has labels, otherwise the cosine to the dense model. Speed is on the target, against
    its dense model as anybody would run it, in batches sorted by length.
    """
    tokens, progress = tokens or TokenSettings(), progress or Silent()
    before = torch.get_num_threads()
    torch.set_num_threads(asked.threads or cores())
    try:
        progress.stage("Reading model and data")
        prepared = prepare(asked.settings(), probed=True)
        if prepared.generates:
            raise UnsupportedModel("tokens are dropped from text encoders; a language model needs all of them to go on")
        with tempfile.TemporaryDirectory() as folder:
            return _swept(asked, tokens, prepared, Path(folder), out, progress)
    finally:
        torch.set_num_threads(before)


def _swept(
    asked: StudySettings,
    settings: TokenSettings,
    prepared: Prepared,
    folder: Path,
    out: str | Path | None,
    progress: Progress,
) -> dict[str, Any]:
    policies = settings.policies(len(prepared.encoder.layers), special_ids(prepared.loaded.tokenizer))
    batches = calibration_batches(prepared.calibration, most_tokens=FITTED_TOKENS)
    progress.stage("Fitting policies", len(policies))
    learnt: list[dict[str, Tensor]] = []
    known: dict[tuple[object, ...], dict[str, Tensor]] = {}
    for policy in policies:
        # a gate depends on where it stands, not on how many tokens it lets through
        key = (policy.scorer, *(s.after for s in policy.stages), *(policy.stages if policy.exit else ()))
        if key not in known:
            known[key] = fit(prepared.encoder, policy, batches, seed=asked.seed)
            give_back_what_is_freed()
        learnt.append(known[key])
        progress.advance(note=described(policy))

    data, reference = prepared.splits.guardrail, outputs_of(prepared.network, prepared.guardrail)
    packed = [Packed(prepared.encoder, *pair) for pair in zip(policies, learnt, strict=True)]
    progress.stage("Judging policies on the guardrail texts", len(packed))
    drops = []
    for one in packed:
        outputs = outputs_of(one, prepared.guardrail)
        drops.append(
            paired_drop(prepared.task, reference, outputs, data, confidence=settings.confidence, seed=asked.seed)
        )
        progress.advance(note=described(one.policy))

    timings, names = _timed(asked, settings, prepared, packed, folder, progress)
    dense, size = timings["dense"], parameters(prepared.model)
    about: dict[str, Any] = {"target": settings.target, "precision": "fp32", "alternative": None, "parameters": size}
    rows = [as_row(Judged(Candidate("dense", BASELINE, **about), dense, ratio(dense, dense)), dense)]
    if "unpadded" in timings:
        exact = Candidate("unpadded", "folded", **about, note="exact: no layer computes on padding")
        rows.append(as_row(Judged(exact, timings["unpadded"], ratio(dense, timings["unpadded"])), dense))
    verdicts = []
    for name, drop in zip(names, drops, strict=True):
        passed = passes(drop, settings.max_drop)
        candidate = Candidate(name, "tokens", **about, eligible=True)
        verdicts.append(Judged(candidate, timings[name], ratio(dense, timings[name]), drop, passed))
    passing = [(one.seconds, i) for i, one in enumerate(verdicts) if one.passed]
    best = min(passing)[1] if passing else None
    rows += [{**as_row(one, dense), "chosen": i == best, "policy": packed[i].policy} for i, one in enumerate(verdicts)]
    facts: dict[str, Any] = {
        "model": asked.model,
        "task": prepared.task.NAME,
        "family": prepared.anatomy.family,
        "target": settings.target,
        "quality_metric": drops[0].metric,
        "quality_dense": drops[0].dense,
        "objective": {"dial": "max_drop", "value": settings.max_drop, "max_drop": settings.max_drop},
        "confidence": settings.confidence,
        "samples": len(data),
        "mean_tokens": float(prepared.guardrail.lengths.mean()),
        "rounds": len(dense.offline_seconds),
        "accepted": best is not None,
        "candidates": rows,
        "policy": None,
        "notes": list(prepared.notes),
        "machine": card(),
    }
    if best is not None:
        chosen, curve = switched_off(packed[best], prepared, settings.target, folder, asked.threads, progress)
        facts |= {"policy": chosen.policy, "lengths": curve}
        if out is not None:
            write_policy(Path(out), chosen)
    facts["verdict"] = _verdict(facts, verdicts, best)
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return plain


def _verdict(facts: Mapping[str, Any], verdicts: Sequence[Judged], best: int | None) -> str:
    if best is None:
        return "No policy passed: keep more tokens, drop them later, or allow a larger drop."
    one = verdicts[best]
    assert one.speedup is not None
    if one.speedup.value <= 1:
        return f"Drop no tokens: {one.candidate.name} passes, but is not faster on these texts."
    off = facts["policy"].off_below
    short = f" Texts of up to {off} tokens keep all: there it does not pay." if off else ""
    return f"Use {one.candidate.name}: {one.speedup.value:.2f} times the texts per second.{short}"


def write_policy(folder: Path, packed: Packed) -> None:
    """The policy, and the tensors that it has learnt, as files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if packed.tensors:
        with replacing(folder / TENSORS) as beside:
            save_file(packed.tensors, beside)
    with replacing(folder / POLICY) as beside:
        beside.write_text(packed.policy.to_json() + "\n", encoding="utf-8")


def _timed(
    asked: StudySettings,
    settings: TokenSettings,
    prepared: Prepared,
    packed: Sequence[Packed],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Timing], list[str]]:
    """Timings of "dense", of "unpadded" on torch, and of every policy by the name that it goes by."""
    names = [described(one.policy) for one in packed]
    progress.stage("Preparing for the target", len(packed))
    alternatives = [dense_alternative(prepared, settings.target, folder)]
    if settings.target == "torch":
        alternatives.append(replace(alternative_of(None, "unpadded", prepared, "torch", folder), name="unpadded"))
    for name, one in zip(names, packed, strict=True):
        alternatives.append(alternative_of(one, name, prepared, settings.target, folder))
        progress.advance()
    progress.stage(f"Timing {len(alternatives)} ways, interleaved", ROUNDS)
    batches, singles = timing_batches(prepared.guardrail)
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
