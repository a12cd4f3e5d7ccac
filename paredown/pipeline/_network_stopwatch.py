"""Times of graphs on the target, beside the dense network's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from paredown.pipeline import _loaders
from paredown.pipeline._networks import Pictured
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._work import Work
from paredown.targets import export_graph, save_graph
from paredown.validation.timing import Alternative, Timing, measure

ROUNDS = 25  # at most; fewer where they would take longer than the seconds that each alternative has
SECONDS = 1.5  # of timing each: what a part saves is a few per cent of a pass, and each pass is as far off as that


@dataclass
class NetworkStopwatch:
    """Times graphs on the target, always beside the dense one so that a drifting clock cancels out.

    `metric` is "offline" (seconds per pass over batches) or "single" (median seconds of one picture).
    """

    prepared: Pictured
    settings: Settings
    work: Work
    metric: str
    dense: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        batches, singles = self.prepared.timing()
        self._batches = batches[:1]
        self._singles = singles if self.metric == "single" else []

    def time(
        self, models: Mapping[str, fx.GraphModule], *, seconds: float = SECONDS, progress: Progress | None = None
    ) -> dict[str, float]:
        """Seconds of each by name, as multiples of the dense one's in the same run times its first measured time;
        `seconds` are spent on timing each.
        """
        names, found, folder = list(models), dict[str, float](), self.work.path("probes")
        size = self.prepared.together - 1
        for start in range(0, len(names), size):
            part = names[start : start + size]
            shutil.rmtree(folder, ignore_errors=True)  # what a start that was stopped left is of other networks
            folder.mkdir()
            ways = []
            for number, name in enumerate(part):
                ways.append(on_target(self.settings.target, models[name], name, folder / f"{number}.onnx"))
                if progress:
                    progress.advance(0.5)
            found |= self.against(ways, seconds=seconds)
            if progress:
                progress.advance(0.5 * len(part))
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def against(self, alternatives: Sequence[Alternative], *, seconds: float = SECONDS) -> dict[str, float]:
        """The same of alternatives that are there."""
        file = self.work.file("dense.onnx", lambda path: export_graph(self.prepared.model, path))
        dense = on_target(self.settings.target, self.prepared.model, "dense, as it is", file)
        timings = measure(
            [dense, *alternatives],
            self._batches,
            singles=self._singles,
            rounds=ROUNDS,
            seconds=seconds * (1 + len(alternatives)),
            threads=self.settings.threads,
            together=self.prepared.together,
        )
        reference = self._seconds(timings[dense.name])
        self.dense = self.dense or float(np.median(reference))
        ratios = {one.name: np.median(self._seconds(timings[one.name]) / reference) for one in alternatives}
        return {name: float(ratio) * self.dense for name, ratio in ratios.items()}

    def _seconds(self, timing: Timing) -> Any:
        return timing.offline_seconds if self.metric == "offline" else np.median(timing.single_ms, axis=1) / 1e3


def on_target(target: str, model: fx.GraphModule, name: str, file: Path) -> Alternative:
    """A graph as a worker runs it: an ONNX file, or for torch a folder with the graph and its tensors, each
    written unless it is there.
    """
    if target == "torch":
        return Alternative(name, _loaders.GRAPH, str(save_graph(model, file.with_suffix(""))))
    if not file.exists():
        export_graph(model, file)
    return Alternative(name, _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(file))
