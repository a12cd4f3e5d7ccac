"""WHERE IT RUNS: one file per runtime, each with `LIMITS`, `export` and `load`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paredown.errors import ParedownError
from paredown.targets._graph import INPUT as PICTURES
from paredown.targets._graph import export_graph, graph_runner, load_graph, save_graph
from paredown.targets._stock import export_stock, stock_runner

if TYPE_CHECKING:
    from torch import nn

    from paredown.types import Anatomy

__all__ = [
    "PICTURES",
    "export",
    "export_graph",
    "export_stock",
    "graph_runner",
    "load_graph",
    "save_graph",
    "stock_runner",
]


def export(model: nn.Module, anatomy: Anatomy, *, target: str, folder: str | Path) -> Path:
    """The file that a runtime serves, written into `folder`: model.onnx, or model.xml with its .bin for OpenVINO.

    `model` is a dense or cut transformers model that `anatomy` describes. For a whole bundle with its proof see
    `paredown.prune`; torch serves from that bundle.
    """
    from paredown.encoder import Encoder
    from paredown.targets import onnxruntime, openvino

    if target not in ("onnxruntime", "openvino"):
        raise ParedownError(f"there is no file format for the target {target!r}; choose onnxruntime or openvino")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    onnx = onnxruntime.export(Encoder(model, anatomy.layout), place / "model.onnx")
    return onnx if target == "onnxruntime" else openvino.export(onnx, place / "model.xml")
