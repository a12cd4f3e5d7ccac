"""ONNX Runtime on the CPU: standard ONNX operators in one file, which runs without Paredown.

Legend: B batch, T tokens, D model width.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.files import replacing
from paredown.targets import _lean
from paredown.targets._probe import probe
from paredown.targets._tokens import METADATA as TOKENS_METADATA
from paredown.targets._tokens import Stages, TokenPruned
from paredown.targets._trace import ROWS, TOKENS, prefix, quiet, trace
from paredown.types import Array, Limits, Runner

if TYPE_CHECKING:
    from paredown.encoder import Encoder

__all__ = ["LIMITS", "export", "load", "probe", "quiet"]

# One AVX-512 register, or two of AVX2, hold 16 floats. Finer steps could not be told apart: FFN widths from 752 to 768
# of MiniLM take times within the 5 % that the measurement scatters, in fp32 and in int8.
LIMITS = Limits(multiple_of=16)
OPSET = 20  # the first one with Gelu as an operator


def export(encoder: Encoder | TokenPruned, path: Path, *, opset: int | None = None, like: Path | None = None) -> Path:
    """`path`, written: an ONNX file that computes `encoder`, with batch and length left open.

    Inputs are int64 [B, T] named as in `encoder.input_names`; the one float32 output is named `encoder.output_name`.
    Embeddings, pooling and head are traced with torch's exporter; the layers between them are written by `_lean`,
    whatever widths they have, and the stages of a token policy by `_tokens`. `like` is an earlier export of the same
    architecture: its trace is used again, which saves seconds; not where tokens go, in it or now. Raises
    UnsupportedModel for layers that cannot be written and policies that merge tokens, MissingExtra.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error
    from paredown.encoder import Encoder

    if opset is not None and opset < OPSET:
        raise ParedownError(f"opset {opset} has no Gelu operator; use {OPSET} or newer, or leave it out")
    stages, model = None, None
    if not isinstance(encoder, Encoder):
        stages = None if encoder.policy.is_identity else Stages(encoder, opset or OPSET)
        encoder = encoder.encoder
    if like is not None and stages is None:
        model = _refilled(encoder, onnx.load(os.fspath(like)))
    model = model or _assemble(encoder, opset or OPSET, stages)
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


def _layers_of(encoder: Encoder, keys_read: Collection[int] = ()) -> tuple[_lean.Shared, list[dict[str, Array]]]:
    common = _lean.shared(encoder)
    last = len(encoder.layers) - 1
    return common, [
        _lean.tensors_of(
            layer,
            first_row=common.first_row and i == last,
            position_bias=common.position_bias,
            key_bias=i in keys_read,
        )
        for i, layer in enumerate(encoder.layers)
    ]


def _assemble(encoder: Encoder, opset: int, stages: Stages | None = None) -> Any:
    """The whole graph: traced embeddings and mask, written layers and stages, pooling, traced head."""
    from onnx import helper, numpy_helper

    common, layers = _layers_of(encoder, stages.keys_read if stages else ())
    model, tail = _traced(encoder, common, opset, tokens=True) if stages else _traced(encoder, common, opset)
    nodes, initializers = _lean.build(layers, common, stages.between if stages else None)

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
    elif stages:
        writer = _lean.Writer()
        stages.pool(writer)
        ends = writer.nodes
        initializers += writer.initializers
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
    # The exporter's guesses at inner shapes make onnxruntime.quantization fail (ShapeInferenceError).
    graph.ClearField("value_info")
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = (TOKENS_METADATA, stages.policy) if stages else (_lean.METADATA, common.to_json())
    return model


def _traced(encoder: Encoder, common: _lean.Shared, opset: int, *, tokens: bool = False) -> tuple[Any, Any]:
    """Two traced graphs: inputs -> `stem.stream` [B, T, D] and MASK; `tail.stream` and the mask -> the output.

    With `tokens`, where some may go, the stem also gives the position bias if there is one, and the tail takes the
    pooled vectors [B, 1, D].
    """
    import torch
    from torch import nn

    biased = tokens and common.position_bias

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            x = encoder.embed(input_ids, token_type_ids)
            made = x, encoder.mask(x, attention_mask)
            return (*made, encoder.position_bias(x)) if biased else made

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, stream: Any, attention_mask: Any) -> Any:
            return encoder.finish(stream) if tokens else encoder.pool(stream, attention_mask)

    # Token 5 exists everywhere.
    ids, mask = torch.full((2, 7), 5), torch.ones(2, 7, dtype=torch.long)
    one_row = tokens or common.first_row
    stream = torch.zeros(2, 1 if one_row else 7, common.width)
    inputs = (ids, mask, torch.zeros_like(ids))[: len(encoder.input_names)]
    given, made = encoder.input_names, ["stem.stream", _lean.MASK] + ["stem.bias"] * biased
    stem = trace(Stem(), inputs, given, made, opset, [TOKENS] * len(inputs))
    axes = [ROWS if one_row else TOKENS, TOKENS]
    tail = trace(Tail(), (stream, mask), ("tail.stream", "attention_mask"), [encoder.output_name], opset, axes)
    prefix(tail, "tail.", {name: name for name in ("attention_mask", "tail.stream", encoder.output_name)})
    prefix(stem, "stem.", {name: name for name in (*given, *made)})
    return stem, tail


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
