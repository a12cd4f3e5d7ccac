"""A traced network as an ONNX file, as a folder, and on torch: pictures [B, 3, H, W] in, logits [B, C] out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.files import replacing, state_of
from paredown.types import Array, Runner

if TYPE_CHECKING:
    from torch import fx

INPUT, OUTPUT = "pixel_values", "logits"
NODES, WEIGHTS = "graph.json", "model.safetensors"  # files of a folder


def export_graph(model: fx.GraphModule, path: Path) -> Path:
    """`path`, written by torch's exporter with the batch left open; every engine folds batch norm by itself.

    Raises MissingExtra, and ParedownError for an operator that ONNX does not have.
    """
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
        import torch
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error
    from paredown.targets._trace import quiet

    shape = next(node.meta["shape"] for node in model.graph.nodes if node.op == "placeholder")
    example = torch.zeros(2, *shape[1:])
    with quiet():
        try:
            program = torch.onnx.export(
                model.eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ParedownError(
                f"torch could not export this network to ONNX: {str(error).splitlines()[-1]}"
            ) from error
    assert program is not None
    with replacing(Path(path)) as beside:
        program.save(os.fspath(beside))
    return Path(path)


class _GraphRunner:
    def __init__(self, model: fx.GraphModule):
        self._model = model

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(inputs[INPUT]))
            return {OUTPUT: np.asarray(self._model(x).float().numpy())}

    def close(self) -> None:
        return None


def graph_runner(model: fx.GraphModule, *, threads: int) -> Runner:
    """A runner of the network on plain torch. Sets torch's number of threads for the whole process."""
    import torch

    torch.set_num_threads(threads)
    runner: Any = _GraphRunner(model.eval())
    return runner  # type: ignore[no-any-return]


def save_graph(model: fx.GraphModule, folder: Path) -> Path:
    """The folder that `load_graph` reads; one that is whole is left as it is."""
    from safetensors.torch import save_file

    from paredown.graph import to_json

    if not (folder / NODES).exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state_of(model), folder / WEIGHTS)
        with replacing(folder / NODES) as beside:  # written last: where it is, the folder is whole
            beside.write_text(json.dumps(to_json(model)))
    return folder


def load_graph(path: str, *, threads: int) -> Runner:
    """A runner of the network that `save_graph` wrote, on plain torch."""
    from safetensors.torch import load_file

    from paredown.graph import from_json

    nodes = json.loads((Path(path) / NODES).read_text())
    return graph_runner(from_json(nodes, load_file(Path(path) / WEIGHTS)), threads=threads)
