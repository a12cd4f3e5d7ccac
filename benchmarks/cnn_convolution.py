"""One convolution and its half on every engine, against the factor of two that the arithmetic promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONVOLUTION = (256, 56)  # channels in and out, height and width
PEAK = "peak"
REPEATS = 4  # of a call, of which the first finds cold caches and is left out


def measure(work: Path, *, batches: Sequence[int] = (1, 8), rounds: int = 15) -> dict[str, Any]:
    """A 3x3 convolution of 256 to 256 channels on 56 x 56 and the same with half of its outputs, on every engine.

    `of_theory` is the share of the promised factor of two. `fixed_ms` is what a call takes beside the arithmetic, if
    both networks compute at the same rate: the part of the time that does not shrink.
    """
    from paredown.cores import cores
    from paredown.kernels import peak
    from paredown.validation import timing
    from paredown.validation.machine import card

    channels, size = CONVOLUTION
    loaders = {
        "onnxruntime": "paredown.targets.onnxruntime:load",
        "openvino": "paredown.targets.openvino:load",
        "torch": "cnn_convolution:torch_convolution",
    }
    made = {outputs: _convolution(outputs, work / f"convolution-{outputs}") for outputs in (channels, channels // 2)}
    engines = [
        timing.Alternative(f"{engine} {outputs}", loader, str(made[outputs].with_suffix(_suffix(engine))))
        for engine, loader in loaders.items()
        for outputs in made
    ]
    engines.append(timing.Alternative(PEAK, "cnn_convolution:busy", ""))
    x = np.random.default_rng(0).standard_normal((max(batches), channels, size, size), dtype=np.float32)
    calls = [{"pixel_values": x[:count]} for count in batches for _ in range(REPEATS)]
    taken = timing.measure(engines, calls[:1], singles=calls, rounds=rounds, threads=cores())
    most = peak.operations(cores()) / float(taken[PEAK].single_ms.min()) / 1e6
    rows = []
    for engine in loaders:
        for number, count in enumerate(batches):
            one, other = (_calls(taken[f"{engine} {outputs}"], number) for outputs in made)
            times = [float(np.median(timed.single_ms)) for timed in (one, other)]
            work_done = [2e-6 * count * outputs * channels * 9 * size**2 for outputs in made]
            rates = [done / spent for done, spent in zip(work_done, times, strict=True)]
            speed = timing.latency_ratio(one, other)
            rows.append(
                {
                    **{"engine": engine, "batch": count, "dense_ms": times[0], "pruned_ms": times[1]},
                    **{"dense_gflops": rates[0], "pruned_gflops": rates[1]},
                    **{"dense_of_peak": rates[0] / most, "pruned_of_peak": rates[1] / most},
                    **{"speedup": vars(speed), "of_theory": speed.value / 2},
                    **{"fixed_ms": 2 * times[1] - times[0]},
                }
            )
    return {"rows": rows, "peak_gflops": most, "threads": cores(), "machine": card()}


def _calls(taken: Any, number: int) -> Any:
    from paredown.validation import timing

    return timing.Timing(
        taken.name, taken.offline_seconds, taken.single_ms[:, REPEATS * number + 1 : REPEATS * (number + 1)], 1
    )


def _suffix(engine: str) -> str:
    return ".safetensors" if engine == "torch" else ".onnx"


def _convolution(outputs: int, path: Path) -> Path:
    """Its files, with two suffixes."""
    import torch
    from safetensors.torch import save_file

    from paredown.graph import trace
    from paredown.targets import export_graph

    channels, size = CONVOLUTION
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
    save_file(module.state_dict(), path.with_suffix(".safetensors"))
    export_graph(trace(module, torch.zeros(2, channels, size, size)), path.with_suffix(".onnx"))
    return path


def torch_convolution(path: str, *, threads: int) -> Any:
    """What the timing calls in a process of its own; the one below too."""
    import torch
    from safetensors.torch import load_file

    from paredown.graph import trace
    from paredown.targets import graph_runner

    weight = load_file(path)["0.weight"]
    module = torch.nn.Sequential(torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False))
    module.load_state_dict({"0.weight": weight})
    return graph_runner(trace(module, torch.zeros(2, weight.shape[1], *CONVOLUTION[1:] * 2)), threads=threads)


class _Busy:
    """The vector units at their most."""

    def __init__(self, threads: int):
        from paredown.kernels import encoder

        encoder.use_threads(threads)
        self._threads = threads

    def run(self, inputs: Any) -> dict[str, Any]:
        from paredown.kernels import peak

        peak.busy(self._threads)
        return {}

    def close(self) -> None:
        return None


def busy(path: str, *, threads: int) -> _Busy:
    return _Busy(threads)
