"""Time on the target, measured: the table that plans are made from, and plans timed before they are believed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paredown import registry
from paredown.pipeline import _loaders
from paredown.pipeline._prepare import Prepared, timing_batches
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._work import Work
from paredown.planning import LatencyTable, Widths, fit_latency, latency_probes
from paredown.targets.onnxruntime import probe
from paredown.types import Array, Limits, Plan
from paredown.validation.timing import Alternative, Timing, measure

WORK_PER_PASS = 1.2e10  # multiply-accumulates of a timed pass: a third of a second on two cores
ROUNDS = 4
DENSE = "dense, exact folds"


@dataclass
class Stopwatch:
    """Times encoders of any widths on the target, always beside the dense one so that a drifting clock cancels out.

    `metric` is "offline" (seconds per pass over length-sorted batches) or "single" (median milliseconds of one text).
    """

    prepared: Prepared
    settings: Settings
    work: Work
    dense_onnx: Path
    metric: str
    limits: Limits = field(init=False)
    dense: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.limits = registry.find("targets", self.settings.target).LIMITS
        tokens = self.prepared.guardrail
        layers = sum(
            p.numel()
            for p in self.prepared.encoder.model.get_submodule(self.prepared.anatomy.layout.layers).parameters()
        )
        batches, singles = timing_batches(tokens, most_tokens=int(WORK_PER_PASS / layers))
        self._batches = batches if self.metric == "offline" else batches[:1]
        self._singles = singles if self.metric == "single" else []

    @property
    def full(self) -> Widths:
        heads = [g for g in self.prepared.anatomy.groups if g.kind == "head"]
        neurons = [g for g in self.prepared.anatomy.groups if g.kind == "neuron"]
        return tuple((h.units, n.units) for h, n in zip(heads, neurons, strict=True))

    def time(
        self, shapes: Sequence[Widths], progress: Progress | None = None, *, rounds: int = ROUNDS
    ) -> dict[Widths, float]:
        """Seconds of each shape, as multiples of the dense model's in the same run times its first measured time."""
        found: dict[Widths, float] = {}
        size = self.prepared.together - 1  # beside the dense one; a probe is a file, gone when its group is timed
        for start in range(0, len(shapes), size):
            part = shapes[start : start + size]
            timings = self._measure(
                [
                    self._alternative(DENSE, self.full),
                    *(self._alternative(f"{start + i}", s) for i, s in enumerate(part)),
                ],
                rounds,
            )
            for probed in self.work.folder.glob("probe-*.onnx"):
                probed.unlink()  # each is as large as the model
            reference = self._seconds(timings[DENSE])
            self.dense = self.dense or float(np.median(reference))
            for i, shape in enumerate(part):
                ratios = self._seconds(timings[f"{start + i}"]) / reference
                found[shape] = float(np.median(ratios)) * self.dense
                if progress:
                    progress.advance()
        return found

    def against(self, alternatives: Sequence[Alternative]) -> dict[str, float]:
        """Seconds of other alternatives by name, by the same clock as `time`. Call `table` first."""
        timings = self._measure([self._alternative(DENSE, self.full), *alternatives], rounds=3)
        reference = self._seconds(timings[DENSE])
        ratios = {one.name: np.median(self._seconds(timings[one.name]) / reference) for one in alternatives}
        return {name: float(ratio) * self.dense for name, ratio in ratios.items()}

    def table(self, progress: Progress) -> LatencyTable:
        """The latency table of this machine and target, measured unless an earlier start of the run has."""
        shapes = latency_probes(len(self.full), *self.full[0], self.limits)

        def compute() -> Mapping[str, object]:
            progress.stage(f"Timing widths on {self.settings.target}", len(shapes))
            found = self.time(shapes, progress)
            return {"dense": self.dense, "seconds": [found[shape] for shape in shapes]}

        stored = self.work.json(f"latency-{self.metric}", compute)
        self.dense = float(stored["dense"])
        seconds = dict(zip(shapes, stored["seconds"], strict=True))
        return fit_latency(seconds.__getitem__, shapes)

    def _measure(self, alternatives: Sequence[Alternative], rounds: int = ROUNDS) -> dict[str, Timing]:
        return measure(
            alternatives,
            self._batches,
            singles=self._singles,
            rounds=rounds,
            threads=self.settings.threads,
            together=self.prepared.together,
        )

    def _alternative(self, name: str, widths: Widths) -> Alternative:
        if self.settings.target == "torch":
            loaded = self.prepared.loaded
            options = {"plan": first_units(self.prepared, widths).to_json(), "task": loaded.task}
            return Alternative(name, _loaders.CUT, loaded.source, options)
        if widths == self.full:
            return Alternative(name, self._loader, str(self.dense_onnx))
        path = self.work.path(f"probe-{hashlib.sha256(repr(widths).encode()).hexdigest()[:12]}.onnx")
        if not path.exists():
            probe(self.dense_onnx, path, widths)
        return Alternative(name, self._loader, str(path))

    @property
    def _loader(self) -> str:
        return _loaders.ONNX if self.settings.target == "onnxruntime" else _loaders.OPENVINO

    def _seconds(self, timing: Timing) -> Array:
        """[R]: what a round took by this stopwatch's metric."""
        return timing.offline_seconds if self.metric == "offline" else np.median(timing.single_ms, axis=1)


def first_units(prepared: Prepared, widths: Widths) -> Plan:
    """A plan of these widths for timing only: the topmost layers, the first heads and neurons of each."""
    keep = prepared.anatomy.identity()
    total = len(keep["layers"])
    keep["layers"] = tuple(range(total - len(widths), total))
    for layer, (heads, neurons) in zip(keep["layers"], widths, strict=True):
        keep[f"layer.{layer}.heads"] = tuple(range(heads))
        keep[f"layer.{layer}.neurons"] = tuple(range(neurons))
    return Plan(prepared.anatomy.fingerprint, keep)


def widths_of(plan: Plan) -> Widths:
    """(heads, neurons) of every layer that the plan keeps."""
    return tuple(
        (len(plan.keep[f"layer.{i}.heads"]), len(plan.keep[f"layer.{i}.neurons"])) for i in plan.keep["layers"]
    )
