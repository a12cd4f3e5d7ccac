"""OpenVINO on the CPU, from the file that `targets.onnxruntime` exports."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.types import Array, Limits, Runner

LIMITS = Limits(multiple_of=16)  # one AVX-512 register of floats; the same as for ONNX Runtime, so that plans fit both


def export(onnx_path: Path, path: Path) -> Path:
    """`path` (it ends in .xml), written with its weights in the .bin beside it; float32, as in the ONNX file.

    The .bin is put in place first, so that an .xml is never there without its weights. Raises ParedownError for a
    file that OpenVINO cannot read, MissingExtra.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ParedownError(f"an OpenVINO model is a pair of .xml and .bin files, so {path.name!r} must end in .xml")
    openvino = _openvino()
    try:
        model = openvino.convert_model(os.fspath(onnx_path))
    except Exception as error:  # the frontend's own classes are not public
        raise _unreadable(onnx_path, error) from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as folder:
        written = Path(folder) / path.name
        openvino.save_model(model, os.fspath(written), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
    return path


def load(path: Path, *, threads: int, precision: str = "f32") -> Runner:
    """A runner of an .xml or .onnx file: one stream, tuned for latency. Inputs the graph lacks are ignored.

    `precision` is OpenVINO's hint for its kernels ("f32", "bf16", "f16"); without one it would take bf16 where the
    CPU has it, which changes the results. Raises ParedownError for a file it cannot open, MissingExtra.
    """
    openvino = _openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
    }
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(os.fspath(path)), "CPU", settings)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return _OpenVinoRunner(compiled)


class _OpenVinoRunner:
    def __init__(self, compiled: Any):
        self._request = compiled.create_infer_request()
        self._inputs = [port.get_any_name() for port in compiled.inputs]
        self._outputs = [port.get_any_name() for port in compiled.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self._request.infer({name: inputs[name] for name in self._inputs}, share_inputs=True)
        # The results lie in memory that the next call overwrites.
        return {name: np.array(results[i], np.float32) for i, name in enumerate(self._outputs)}

    def close(self) -> None:
        self._request = None


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
    return openvino


def _unreadable(path: Path, error: Exception) -> ParedownError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return ParedownError(f"OpenVINO cannot open {path}: {lines[-1].strip()}")
