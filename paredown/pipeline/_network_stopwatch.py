"""Times of graphs on the target, beside the dense network's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from paredown.pipeline import _loaders
from paredown.pipeline._networks import Pictured
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._work import Work
from paredown.quantization.int8 import quantize_static
from paredown.targets import PICTURES, export_graph, save_graph
from paredown.validation.timing import Alternative, Timing, measure

ROUNDS = 25  # at most; fewer where they would take longer than the seconds that each alternative has
CALIBRATED = 128  # pictures that int8 takes its ranges from
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
    dense_int8: float | None = field(init=False, default=None)  # of its int8 form, where that may be the answer

    def __post_init__(self) -> None:
        batches, singles = self.prepared.timing()
        self._batches = batches[:1]
        self._singles = singles if self.metric == "single" else []

    def time(
        self,
        models: Mapping[str, fx.GraphModule],
        *,
        int8: bool = False,
        seconds: float = SECONDS,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Seconds of each by name, as it is or in int8, as multiples of the dense one's in the same run times its first
        measured time; `seconds` are spent on timing each.
        """
        names, found, folder = list(models), dict[str, float](), self.work.path("probes")
        size = self.prepared.together - 1
        for start in range(0, len(names), size):
            part = names[start : start + size]
            shutil.rmtree(folder, ignore_errors=True)  # what a start that was stopped left is of other networks
            folder.mkdir()
            ways = []
            for number, name in enumerate(part):
                way = on_target(self.settings.target, models[name], name, folder / f"{number}.onnx")
                if int8:
                    file = in_int8(self.prepared, Path(way.path), folder / f"{number}-int8.onnx")
                    way = replace(way, path=str(file))
                ways.append(way)
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


def in_int8(prepared: Pictured, source: Path, path: Path) -> Path:
    """`path`, an ONNX file of a network of these pictures in int8, its ranges those of calibration pictures."""
    data = prepared.splits.calibration
    part = data.take(np.arange(min(CALIBRATED, len(data))))
    batches = [{PICTURES: batch.numpy()} for batch in prepared.batches(part, 32)]
    return quantize_static(source, path, batches)


def on_target(target: str, model: fx.GraphModule, name: str, file: Path) -> Alternative:
    """A graph as a worker runs it: an ONNX file, or for torch a folder with the graph and its tensors, each
    written unless it is there.
    """
    if target == "torch":
        return Alternative(name, _loaders.GRAPH, str(save_graph(model, file.with_suffix(""))))
    if not file.exists():
        export_graph(model, file)
    return Alternative(name, _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(file))
