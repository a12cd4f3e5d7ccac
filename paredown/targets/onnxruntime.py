"""ONNX Runtime on the CPU: standard ONNX operators in one file, which runs without Paredown.

Legend: B batch, T tokens, D model width.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.files import replacing
from paredown.targets import _lean
from paredown.targets._probe import probe
from paredown.types import Array, Limits, Runner

if TYPE_CHECKING:
    from torch import nn

    from paredown.encoder import Encoder

__all__ = ["LIMITS", "export", "load", "probe", "quiet"]

# One AVX-512 register, or two of AVX2, hold 16 floats. Finer steps could not be told apart: FFN widths from 752 to 768
# of MiniLM take times within the 5 % that the measurement scatters, in fp32 and in int8.
LIMITS = Limits(multiple_of=16)
OPSET = 20  # the first one with Gelu as an operator


def export(encoder: Encoder, path: Path, *, opset: int | None = None, like: Path | None = None) -> Path:
    """`path`, written: an ONNX file that computes `encoder`, with batch and length left open.

    Inputs are int64 [B, T] named as in `encoder.input_names`; the one float32 output is named `encoder.output_name`.
    Embeddings, pooling and head are traced with torch's exporter; the layers between them are written by `_lean`,
    whatever widths they have. `like` is an earlier export of the same architecture: its trace is used again, which
    saves seconds. Raises UnsupportedModel for layers that cannot be written, MissingExtra.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error
    if opset is not None and opset < OPSET:
        raise ParedownError(f"opset {opset} has no Gelu operator; use {OPSET} or newer, or leave it out")
    model = _refilled(encoder, onnx.load(os.fspath(like))) if like is not None else None
    model = model or _assemble(encoder, opset or OPSET)
    onnx.checker.check_model(model)
    with replacing(Path(path)) as beside:
        onnx.save(model, os.fspath(beside))
    return Path(path)


def _refilled(encoder: Encoder, model: Any) -> Any:
    """An export with the tensors and layers of `encoder` in place of its own; None if its trace holds other things."""
    from onnx import TensorProto, numpy_helper

    common, layers = _layers_of(encoder)
    if {entry.key: entry.value for entry in model.metadata_props}.get(_lean.METADATA) != common.to_json():
        return None
    own = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for tensor in model.graph.initializer:
        part, _, name = tensor.name.partition(".")
        if part not in ("stem", "tail"):
            continue
        if name in own and list(own[name].shape) == list(tensor.dims):
            tensor.CopyFrom(numpy_helper.from_array(own[name].numpy(), tensor.name))
        elif tensor.data_type != TensorProto.INT64 and tensor.dims:
            return None  # computed from weights when it was traced
    _lean.swap_layers(model.graph, layers, common)
    return model


def _layers_of(encoder: Encoder) -> tuple[_lean.Shared, list[dict[str, Array]]]:
    common = _lean.shared(encoder)
    last = len(encoder.layers) - 1
    return common, [
        _lean.tensors_of(layer, first_row=common.first_row and i == last, position_bias=common.position_bias)
        for i, layer in enumerate(encoder.layers)
    ]


def _assemble(encoder: Encoder, opset: int) -> Any:
    """The whole graph: traced embeddings and mask, written layers, traced pooling and head."""
    from onnx import helper, numpy_helper

    common, layers = _layers_of(encoder)
    model, tail = _traced(encoder, common, opset)
    nodes, initializers = _lean.build(layers, common)

    def constant(name: str, *values: int) -> str:
        initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    flat = constant("glue.flat_shape", -1, common.width)
    glue = [
        helper.make_node("Shape", ["input_ids"], ["glue.size"], name="glue.size"),
        helper.make_node(
            "Concat",
            ["glue.size", constant("glue.head_shape", -1, common.head_dim)],
            [_lean.SPLIT_SHAPE],
            name="glue.split_shape",
            axis=0,
        ),
        helper.make_node("Reshape", ["stem.stream", flat], [_lean.STREAM], name="glue.flat"),
    ]
    if common.first_row:
        axis = constant("glue.row_axis", 1)
        ends = [helper.make_node("Unsqueeze", [_lean.OUTPUT, axis], ["tail.stream"], name="glue.row")]
    else:
        width = constant("glue.stream_width", common.width)
        ends = [
            helper.make_node("Concat", ["glue.size", width], ["glue.stream_shape"], name="glue.stream_shape", axis=0),
            helper.make_node("Reshape", [_lean.OUTPUT, "glue.stream_shape"], ["tail.stream"], name="glue.whole"),
        ]
    graph = model.graph
    graph.node.extend([*glue, *nodes, *ends, *tail.graph.node])
    graph.initializer.extend([*initializers, *tail.graph.initializer])
    del graph.output[:]
    graph.output.extend(tail.graph.output)
    graph.name = "encoder"
    for node in graph.node:
        del node.metadata_props[:]  # stack traces with the paths of the machine that exported
    # The exporter's guesses at inner shapes make onnxruntime.quantization fail (ShapeInferenceError).
    graph.ClearField("value_info")
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = _lean.METADATA, common.to_json()
    return model


def _traced(encoder: Encoder, common: _lean.Shared, opset: int) -> tuple[Any, Any]:
    """Two traced graphs: inputs -> `stem.stream` [B, T, D] and MASK; `tail.stream` and the mask -> the output."""
    import torch
    from torch import nn

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            x = encoder.embed(input_ids, token_type_ids)
            return x, encoder.mask(x, attention_mask)

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, stream: Any, attention_mask: Any) -> Any:
            return encoder.pool(stream, attention_mask)

    # Neither 0 nor 1 in any open dimension: the exporter would take them for constants. Token 5 exists everywhere.
    ids, mask = torch.full((2, 7), 5), torch.ones(2, 7, dtype=torch.long)
    stream = torch.zeros(2, 1 if common.first_row else 7, common.width)
    inputs = (ids, mask, torch.zeros_like(ids))[: len(encoder.input_names)]
    with _evaluating(encoder), quiet():
        try:
            stem = _trace(Stem(), inputs, encoder.input_names, ["stem.stream", _lean.MASK], opset)
            names = ("tail.stream", "attention_mask")
            tail = _trace(Tail(), (stream, mask), names, [encoder.output_name], opset, fixed=common.first_row)
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ParedownError(f"torch could not trace this model to ONNX: {reason[-1]}") from error
    outer = {"attention_mask", "tail.stream", encoder.output_name}
    _prefix(tail, "tail.", outer)
    _prefix(stem, "stem.", {*encoder.input_names, "stem.stream", _lean.MASK})
    return stem, tail


def _trace(
    module: nn.Module,
    inputs: tuple[Any, ...],
    names: tuple[str, ...],
    outputs: list[str],
    opset: int,
    *,
    fixed: bool = False,
) -> Any:
    """The module as an ONNX model with open batch and length; `fixed`: the first input has one row."""
    import torch

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes: list[dict[int, Any]] = [{0: batch, 1: length} for _ in inputs]
    if fixed:
        shapes[0] = {0: batch}
    program = torch.onnx.export(
        module,
        inputs,
        input_names=list(names),
        output_names=outputs,
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=tuple(shapes),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _prefix(model: Any, prefix: str, outer: set[str]) -> None:
    """Gives every inner name the prefix, in place; a name in `outer` stays."""

    def renamed(name: str) -> str:
        return name if not name or name in outer else prefix + name

    for node in model.graph.node:
        node.name = prefix + node.name
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every part in evaluation mode for a while, so that no dropout is traced."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's prints, warnings and log lines away; what it raises still comes through."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        silence = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OnnxRunner:
    def __init__(self, session: Any):
        self._session = session
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._outputs = [entry.name for entry in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed = {name: inputs[name] for name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))

    def close(self) -> None:
        self._session = None


def load(path: Path, *, threads: int) -> Runner:
    """A runner of an ONNX file on `threads` threads that sleep while they wait. Inputs the graph lacks are ignored.

    Raises ParedownError for a file that ONNX Runtime cannot open, MissingExtra.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    # Spinning threads would take the cores from whatever else is being timed or served.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes are not public
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ParedownError(f"ONNX Runtime cannot open {path}: {reason[0]}") from error
    return _OnnxRunner(session)
