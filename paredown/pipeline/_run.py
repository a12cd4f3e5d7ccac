"""The main job: the order of the stages, from a model and a table of texts to a bundle that carries its proof."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from paredown import bundle as bundles
from paredown import registry
from paredown.bundle import Bundle
from paredown.cores import cores
from paredown.encoder import Encoder, blocks_of, linear_of
from paredown.errors import BadData, GateFailed, MissingExtra, ParedownError
from paredown.networks import LoadedNetwork, is_network
from paredown.pipeline import _facts
from paredown.pipeline._candidates import (
    BASELINE,
    Candidate,
    control,
    dense_candidates,
    student_candidates,
    token_candidates,
)
from paredown.pipeline._gate import Judged, chosen, closest, judge, pictured, timed, timed_control, too_slow
from paredown.pipeline._ladder import make, out_of_reach
from paredown.pipeline._latency import Stopwatch
from paredown.pipeline._memory import give_back_what_is_freed, map_large_blocks
from paredown.pipeline._network_run import for_network, gather_network, made_of, write_network
from paredown.pipeline._networks import Pictured, network_key, prepare_network
from paredown.pipeline._policies import policies_for, read_policy, switched_off
from paredown.pipeline._prepare import Prepared, calibration_batches, prepare, run_key
from paredown.pipeline._rounds import Rounds, fitting
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._sparsify import Zeroing
from paredown.pipeline._students import Student, Workshop
from paredown.pipeline._work import Work
from paredown.targets import huggingface, sparse_cpu
from paredown.tokens import Packed
from paredown.types import Limits, TokenPolicy


def run(settings: Settings, progress: Progress, *, network: LoadedNetwork | None = None) -> Bundle:
    """See `paredown.pipeline.prune`. An image classifier may be given as an object."""
    out = Path(settings.out).expanduser().resolve()
    bundles.check_free(out)
    if _holds_accepted(settings.out):
        bundles.check_free(_rejected(settings.out))
    map_large_blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or cores())
    try:
        progress.stage("Reading model and data")
        if network is not None or is_network(settings.model, settings.task):
            pictured = prepare_network(settings, given=network)
            settings = for_network(settings)
            work = _work(out, network_key(settings, pictured), progress)
            return _decided(*made_of(settings, pictured, work, progress), settings, pictured, work, progress)
        settings.only_for(pictures=False)
        prepared = prepare(settings)
        if settings.tokens:
            read_policy(settings.tokens, prepared.encoder)  # what cannot be read is told before the long work
        settings = _for_model(settings, prepared)
        if settings.sized:
            _check_amounts(settings, prepared)
        work = _work(out, run_key(settings, prepared), progress)
        return _decided(*_made(settings, prepared, work, progress), settings, prepared, work, progress)
    finally:
        torch.set_num_threads(before)


def _work(out: Path, key: str, progress: Progress) -> Work:
    """The folder of the run's results, and a word on what lies there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Work(out, key)
    if work.resumed:
        progress.say("Going on from where an earlier run with the same settings stopped.")
    if work.discarded:
        progress.say("What an unfinished run with other settings had left for this place is discarded.")
    return work


def _made(
    settings: Settings, prepared: Prepared, work: Work, progress: Progress
) -> tuple[list[Candidate], list[Student]]:
    """All candidates for texts, and the students among them."""
    for note in prepared.notes:
        progress.say(note)
    if settings.target == "sparse_cpu":
        _compile(prepared, settings, progress)
    candidates = dense_candidates(prepared, settings, work, progress)
    engine = registry.find("targets", settings.target).LIMITS
    limits = _joined(huggingface.LIMITS, engine) if settings.uniform else engine
    if settings.zeroes:
        students = [Zeroing(prepared, settings, work, progress, fitting(limits, prepared.anatomy)).student()]
        candidates = [replace(one, eligible=False) for one in candidates]
    elif settings.sized:
        students = [Rounds(prepared, settings, work, progress, fitting(limits, prepared.anatomy)).student()]
        candidates = [replace(one, eligible=False) for one in candidates]  # the model that was asked for is the answer
    else:
        students = _for_speed(candidates, prepared, settings, work, progress, limits)
    for student in students:
        made = student_candidates(student, prepared, settings, work, progress)
        if settings.sized and settings.gate is None:
            why = "for comparison: say with --max-drop what int8 may lose"
            made = [one if one.precision == "fp32" else replace(one, eligible=False, note=why) for one in made]
        candidates += made
    candidates += _dropping_tokens(candidates, prepared, settings, work, progress)
    return candidates + control(prepared, settings, progress), students


def _decided(
    candidates: Sequence[Candidate],
    students: Sequence[Student],
    settings: Settings,
    prepared: Prepared | Pictured,
    work: Work,
    progress: Progress,
) -> Bundle:
    """The bundle of the candidate that the gate chooses, or GateFailed with that of the closest."""
    judged, baseline, reference = _judged(candidates, prepared, settings, progress)
    best, asked = chosen(judged, settings), settings
    if best is None and _holds_accepted(settings.out):  # a good bundle does not give way to a rejected one
        settings = replace(settings, out=str(_rejected(settings.out)))
    shown = best or closest(judged, settings)
    names = [j.candidate.name for j in judged]
    judged = pictured(judged, prepared, settings, reference, progress)
    shown = judged[names.index(shown.candidate.name)]
    how: dict[str, Any] = {"accepted": best is not None, "minutes": work.minutes}
    if isinstance(prepared, Pictured):
        facts = gather_network(settings, prepared, judged, shown, baseline, students, progress, **how)
    else:
        facts = _facts.gather(settings, prepared, judged, shown, baseline, students, progress, **how)
    facts["command"] = asked.command()
    facts["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    progress.stage("Writing the bundle")
    if isinstance(prepared, Pictured):
        saved = write_network(settings, prepared, work, shown.candidate, facts)
    else:
        saved = _facts.write_bundle(settings, prepared, work, shown.candidate, facts)
    work.discard()
    if best is None:
        raise GateFailed(facts["verdict"], result=saved.report())
    return saved


def _compile(prepared: Prepared, settings: Settings, progress: Progress) -> None:
    """The engine's kernels, before anything is timed; those of an earlier run lie on the disk."""
    progress.stage("Loading the sparse engine, which is compiled once on a machine")
    begun = time.monotonic()
    runner = sparse_cpu.load_encoder(prepared.encoder, threads=settings.threads or cores())
    runner.run(next(iter(calibration_batches(prepared.calibration, most_tokens=1))))
    runner.close()
    from paredown.kernels import encoder as kernels  # compiles too, so not before

    if (taken := time.monotonic() - begun) > 1 and sum(kernels.forward.stats.cache_misses.values()):
        progress.say(f"The sparse engine was compiled for this CPU in {taken:.0f} s.")


def _check_amounts(settings: Settings, prepared: Prepared) -> None:
    """Raises before any work what would fail at its end: ParedownError, BadData, MissingExtra."""
    derived = not prepared.generates or "fused" in prepared.anatomy.layout.layer_names
    if settings.uniform and settings.protect:
        raise ParedownError("Uniform widths and protected layers exclude each other: leave protect or uniform out.")
    if settings.uniform and settings.sublayers:
        raise ParedownError("A stock checkpoint has all sub-layers in every layer: leave sublayers or uniform out.")
    if settings.uniform and derived and (settings.heads or settings.queries):
        raise ParedownError(
            "The stock config of this family derives the size of a head from their number, so no head can go with "
            "uniform: leave heads or uniform out."
        )
    if settings.target == "sparse_cpu" and importlib.util.find_spec("numba") is None:
        raise MissingExtra("numba", "sparse")
    if settings.trains:
        labels = prepared.splits.calibration.labels if prepared.classifies else None
        if settings.recover == "finetune" and not prepared.generates and (labels is None or len(set(labels)) < 2):
            raise BadData("Fine-tuning needs labels, two different ones at least, and there are none: take distill.")
        for package in ("accelerate", "peft") if settings.lora else ("accelerate",):
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(package, "train")


def _for_model(settings: Settings, prepared: Prepared) -> Settings:
    """The settings with the target that the model runs on. Raises ParedownError for what is not for its kind."""
    if not prepared.generates:
        return replace(settings, target=settings.target or ("sparse_cpu" if settings.zeroes else "onnxruntime"))
    if settings.target not in ("", "torch"):
        raise ParedownError(f"Language models run on torch here, and {settings.target} was asked for.")
    if not settings.sized:
        raise ParedownError(
            "Say how much of a language model is to go: heads, neurons or layers (--neurons 20%, --layers 2), or the "
            "share of parameters that stays (--parameters 80%); speeds are for text encoders."
        )
    layout = prepared.anatomy.layout
    down = linear_of(blocks_of(prepared.model, layout)[0], layout, "down")
    if settings.uniform and settings.recover == "compensate" and down.bias is None:
        raise ParedownError(
            "Compensation adds biases, and a stock checkpoint of this family has no place for them: take "
            "--recover reconstruct, or leave --uniform out."
        )
    return replace(settings, target="torch")


def _dropping_tokens(
    candidates: Sequence[Candidate], prepared: Prepared, settings: Settings, work: Work, progress: Progress
) -> list[Candidate]:
    """The same models, dropping tokens while they run: structure and tokens are chosen together, under one gate.

    A gate that learns is fitted to each model anew. The dense model tries a bold policy too. Nothing is tried where the
    file has to be a stock checkpoint, or where it was said how much goes.
    """
    if prepared.generates or settings.uniform or settings.sized:
        return []
    asked = read_policy(settings.tokens, prepared.encoder).policy if settings.tokens else None
    found: list[Candidate] = []
    off = None if asked is None else asked.off_below
    for base in [one for one in candidates if one.eligible and one.precision == "fp32"]:
        layers = len(Encoder(base.model, prepared.anatomy.layout).layers)
        policies = policies_for(prepared, layers, bold=base.kind == "folded", asked=asked)
        if not policies:
            continue
        if off is None:
            off = _pays_above(policies[0], prepared, settings, work, progress)
        progress.stage(f"Dropping tokens of {base.name}")
        policies = [replace(policy, off_below=off) for policy in policies]
        found += token_candidates(base, policies, prepared, settings, work)
    return found


def _pays_above(policy: TokenPolicy, prepared: Prepared, settings: Settings, work: Work, progress: Progress) -> int:
    """Up to which length dropping does not pay on the target. What a gate has learnt does not change its cost."""
    gates = {f"gate.{stage.after}": torch.ones(prepared.anatomy.layout.width) for stage in policy.stages}
    packed = Packed(prepared.encoder, policy, gates)

    def find() -> int:
        found, _ = switched_off(packed, prepared, settings.target, work.path(""), settings.threads, progress)
        return found.policy.off_below

    stored: int = work.json("pays-above", find)
    return stored


def _for_speed(
    candidates: list[Candidate],
    prepared: Prepared,
    settings: Settings,
    work: Work,
    progress: Progress,
    limits: Limits,
) -> list[Student]:
    """The students of a run whose dial is a speed or a drop; puts the fastest dense candidate first."""
    metric = "single" if settings.dial == "latency_ms" else "offline"
    watch = Stopwatch(prepared, settings, work, work.path("dense.onnx"), metric)
    shop = Workshop(prepared, settings, work, watch, progress, limits)
    progress.stage("Timing the dense model on every runtime")
    dense = _dense_seconds(candidates, watch, work)
    fastest = min(dense, key=dense.__getitem__)
    candidates.sort(key=lambda one: one.alternative is None or one.alternative.name != fastest)
    return make(shop, dense[fastest])


def _rejected(out: str) -> Path:
    """Where a rejected bundle goes that must not take the place of an accepted one."""
    place = Path(out).expanduser().resolve()
    return place.with_name(f"{place.name}-rejected")


def _holds_accepted(folder: str) -> bool:
    try:
        return bool(bundles.load(Path(folder).expanduser(), verify=False).manifest["accepted"])
    except ParedownError:
        return False


def _judged(
    candidates: Sequence[Candidate], prepared: Prepared | Pictured, settings: Settings, progress: Progress
) -> tuple[list[Judged], Judged, Any]:
    give_back_what_is_freed()
    judged, fastest = timed(candidates, prepared, settings, progress)
    baseline = next(j for j in judged if j.candidate is fastest)
    assert baseline.timing is not None
    if isinstance(prepared, Prepared):
        texts = prepared.task.all_texts(prepared.splits.guardrail)
        judged = [timed_control(j, texts, baseline.timing) if j.candidate.predictor is not None else j for j in judged]
    _check_reached(settings, judged)
    reference = prepared.dense_answers("guardrail")
    verdicts = judge(judged, prepared, settings, reference, progress)
    return verdicts, next(j for j in verdicts if j.candidate is fastest), reference


def _joined(wanted: Limits, engine: Limits) -> Limits:
    """What both the stock config and the engine accept."""
    return Limits(max(wanted.multiple_of, engine.multiple_of), wanted.uniform, wanted.allowed)


def _dense_seconds(candidates: Sequence[Candidate], watch: Stopwatch, work: Work) -> dict[str, float]:
    """By the stopwatch: what the dense fp32 alternatives take, the fastest of which speed-ups are promised against."""
    alternatives = [c.alternative for c in candidates if c.kind == BASELINE and c.alternative]
    stored: dict[str, float] = work.json("dense-seconds", lambda: watch.against(alternatives))
    return stored


def _check_reached(settings: Settings, judged: Sequence[Judged]) -> None:
    """Raises InfeasibleBudget, naming the closest, when no candidate reaches the speed that was asked for."""
    able = [j for j in judged if j.candidate.eligible and j.timing is not None and j.speedup is not None]
    if settings.dial in ("max_drop", "amount") or any(not too_slow(j, settings) for j in able):
        return
    if settings.dial == "speedup":
        raise out_of_reach(settings, max(j.speedup.value for j in able if j.speedup is not None))
    raise out_of_reach(settings, min(j.timing.latency_ms_p50 for j in able if j.timing is not None))
