"""Encoder layers as ONNX nodes, in the form that runs fastest; the same function with fewer operators.

Per layer: one product for queries, keys and values (the last layer of a [CLS] model computes the query for its first
row alone), 1/sqrt(K) folded into the query weights, the key bias dropped (it adds the same to every score of a row,
which softmax ignores), the value bias moved behind the output projection (attention weights sum to one), all-zero
biases not added. Folds are computed in float64.

The stream is kept as a matrix [B*T, D], so every linear map is one `Gemm` with its bias. In float32 this is as fast as
the plain form. In int8 it keeps ONNX Runtime from fusing SkipLayerNormalization, whose CPU kernel takes longer than the
Add and LayerNormalization it replaces: MiniLM int8 runs 5 % faster on two threads, 12 to 16 % less CPU time on one
(onnxruntime 1.32, AVX-512 with AMX, 64 texts of 15 tokens).

Nodes and tensors are named `layers.<i>.<part>` and hold no head count, so other widths need other tensors only: export
and `_probe` both build layers here, which makes their operators the same by construction.

Legend: B batch, T tokens, D model width, H heads of this layer, K head size, F neurons of this layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import UnsupportedModel
from paredown.types import Array

if TYPE_CHECKING:
    import torch

    from paredown.encoder import Encoder, Layer

METADATA = "paredown.layers"  # key of the model's metadata under which `Shared` lies
STREAM, MASK, OUTPUT, SPLIT_SHAPE = "layers.input", "layers.mask", "layers.output", "layers.split_shape"
WEIGHTS, KEYS = "layers.{}.weights", "layers.{}.piece.1"  # of a layer, [B, H, T, T] and [B, H, T, K]
_LAYER = tuple(f"layers.{digit}" for digit in range(10))  # how the names of layers' nodes and tensors begin
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "silu": ("Swish", {}),
    "swish": ("Swish", {}),
}


@dataclass(frozen=True)
class Shared:
    """What all layers of one graph have in common."""

    head_dim: int
    width: int
    activation: str
    first_row: bool  # the last layer is read at its first row only
    position_bias: bool  # the mask is [B, H, T, T] and not [B, 1, 1, T]
    epsilon: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Shared:
        return cls(**json.loads(text))


def shared(encoder: Encoder) -> Shared:
    """What the layers of `encoder` have in common. Raises UnsupportedModel where that is not one thing."""
    layout, layers = encoder.layout, encoder.layers
    if not layers:
        raise UnsupportedModel("an encoder without layers cannot be exported; keep at least one")
    dtypes = {parameter.dtype for parameter in encoder.parameters()}
    if {str(dtype) for dtype in dtypes} != {"torch.float32"}:
        raise UnsupportedModel(
            f"the export takes float32 models, and this one has {', '.join(sorted(map(str, dtypes)))}"
        )
    epsilons = {float(norm.eps) for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)}
    if len(epsilons) != 1:
        raise UnsupportedModel(f"the layers' norms have {len(epsilons)} different epsilons; the export writes one")
    if layout.activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {layout.activation!r} cannot be exported; known: {sorted(ACTIVATIONS)}")
    first_row, biased = layout.pooling == "cls", bool(layout.position_bias)
    return Shared(layout.head_dim, layout.width, layout.activation, first_row, biased, epsilons.pop())


def tensors_of(layer: Layer, *, first_row: bool, position_bias: bool, key_bias: bool = False) -> dict[str, Array]:
    """The layer's tensors in export form, weights [out, in]. A missing name: not there, or a bias that is all zero.

    `query kv qkv` hold the projections one after the other, `bias_heads` the heads of the shared position bias.
    `key_bias`: the keys are read by others than the softmax, so their bias counts.
    """
    tensors: dict[str, Array] = {}
    out_bias = _vector(layer.output)
    if layer.num_heads:
        scale = 1 / math.sqrt(layer.head_dim)
        query, query_bias = _matrix(layer.query) * scale, _vector(layer.query) * scale
        key, value = _matrix(layer.key), _matrix(layer.value)
        if first_row:
            tensors |= {"query": query, "query_bias": query_bias, "kv": np.concatenate([key, value])}
        else:
            tensors["qkv"] = np.concatenate([query, key, value])
            key_part = _vector(layer.key) if key_bias else np.zeros(len(key))
            tensors["qkv_bias"] = np.concatenate([query_bias, key_part, np.zeros(len(key))])
        tensors["out"] = _matrix(layer.output)
        out_bias = out_bias + tensors["out"] @ _vector(layer.value)
        if position_bias and layer.bias_heads is not None:
            tensors["bias_heads"] = np.asarray(layer.bias_heads)
    tensors["out_bias"] = out_bias
    if layer.num_neurons:
        tensors |= {"up": _matrix(layer.up), "up_bias": _vector(layer.up), "down": _matrix(layer.down)}
    tensors["down_bias"] = _vector(layer.down)
    for name, norm in (("attention_norm", layer.attention_norm), ("ffn_norm", layer.ffn_norm)):
        tensors |= {f"{name}.weight": _numpy(norm.weight), f"{name}.bias": _numpy(norm.bias)}
    dropped = {name for name, tensor in tensors.items() if name.endswith("_bias") and not tensor.any()}
    return {
        name: np.ascontiguousarray(tensor, np.int64 if name == "bias_heads" else np.float32)
        for name, tensor in tensors.items()
        if name not in dropped
    }


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def _matrix(linear: Any) -> Array:
    return _numpy(linear.weight)


def _vector(linear: Any) -> Array:
    return np.zeros(len(linear.weight)) if linear.bias is None else _numpy(linear.bias)


@dataclass(frozen=True)
class Flow:
    """Names of what a layer reads: the stream's matrix [B*T, D], the mask, and the int64 shape (B, T, -1, K)."""

    stream: str
    mask: str
    split_shape: str


Between = Callable[["Writer", int, Flow], Flow]  # writes what comes behind a layer, given its number


def build(
    layers: Sequence[Mapping[str, Array]], common: Shared, between: Between | None = None
) -> tuple[list[Any], list[Any]]:
    """ONNX nodes and initializers from STREAM, MASK and SPLIT_SHAPE to OUTPUT.

    OUTPUT is [B*T, D], or [B, D] where only the first row of the last layer is read. There must be a layer. `between`
    is asked behind every layer but the last.
    """
    writer = Writer()
    flow = Flow(STREAM, MASK, SPLIT_SHAPE)
    for i, tensors in enumerate(layers):
        last = i == len(layers) - 1
        stream = _layer(writer, f"layers.{i}.", tensors, flow, common, first_row=last and common.first_row)
        flow = replace(flow, stream=stream)
        if between is not None and not last:
            flow = between(writer, i, flow)
    writer.nodes[-1].output[0] = OUTPUT
    return writer.nodes, writer.initializers


def swap_layers(graph: Any, layers: Sequence[Mapping[str, Array]], common: Shared) -> None:
    """Builds the layers in the place of those that the graph of an export has."""
    nodes, initializers = build(layers, common)
    names = [node.name.startswith(_LAYER) for node in graph.node]
    start, stop = names.index(True), len(names) - names[::-1].index(True)
    before, after = list(graph.node)[:start], list(graph.node)[stop:]
    kept = [tensor for tensor in graph.initializer if not tensor.name.startswith(_LAYER)]
    del graph.node[:], graph.initializer[:]
    graph.node.extend([*before, *nodes, *after])
    graph.initializer.extend([*kept, *initializers])


class Writer:
    """Collects nodes and tensors; every node has one output of its own name unless told otherwise."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        from onnx import helper

        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        return name

    def tensor(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(value, name))
        return name


def _layer(
    writer: Writer, prefix: str, tensors: Mapping[str, Array], flow: Flow, common: Shared, *, first_row: bool
) -> str:
    for name, tensor in tensors.items():
        writer.tensor(prefix + name, tensor)

    def node(op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        return writer.node(op, inputs, prefix + name, outputs, **attributes)

    def linear(x: str, weight: str, bias: str, name: str) -> str:
        return node("Gemm", [x, prefix + weight] + ([prefix + bias] if bias in tensors else []), name, transB=1)

    def added(x: str, y: str, bias: str, name: str) -> str:
        """x plus the sub-layer's output y, or plus what is left of a sub-layer that is gone: its bias, or nothing."""
        other = y or (prefix + bias if bias in tensors else "")
        return node("Add", [x, other], name) if other else x

    def normed(x: str, name: str) -> str:
        inputs = [x, f"{prefix}{name}.weight", f"{prefix}{name}.bias"]
        return node("LayerNormalization", inputs, f"{name}.output", axis=-1, epsilon=common.epsilon)

    rows = stream = flow.stream
    if first_row:
        width = writer.tensor(prefix + "stream_shape", np.array([common.width], np.int64))
        size = node("Slice", [flow.split_shape, *_constants(writer, prefix, "sides", [0], [2])], "batch_and_length")
        whole = node("Reshape", [stream, node("Concat", [size, width], "rows_shape", axis=0)], "rows")
        first = writer.tensor(prefix + "first", np.array(0, np.int64))
        rows = node("Gather", [whole, first], "first_row", axis=1)
    out = ""
    if "out" in tensors:
        mask = flow.mask
        if common.position_bias:
            if "bias_heads" in tensors:
                mask = node("Gather", [mask, prefix + "bias_heads"], "own_mask", axis=1)
            if first_row:
                mask = node("Slice", [mask, *_constants(writer, prefix, "first_query", [0], [1], [2])], "first_mask")
        if first_row:
            one = writer.tensor(prefix + "one_query_shape", np.array([0, -1, 1, common.head_dim], np.int64))
            query = node("Reshape", [linear(rows, "query", "query_bias", "projected_query"), one], "heads_query")
            projected, parts = linear(stream, "kv", "", "projected"), 2
        else:
            projected, parts = linear(stream, "qkv", "qkv_bias", "projected"), 3
        split = node("Transpose", [node("Reshape", [projected, flow.split_shape], "split")], "heads", perm=[0, 2, 1, 3])
        pieces = node("Split", [split], "piece", outputs=parts, axis=1, num_outputs=parts)
        query = query if first_row else f"{pieces}.0"
        key, value = f"{pieces}.{parts - 2}", f"{pieces}.{parts - 1}"
        scores = node("MatMul", [query, node("Transpose", [key], "turned_key", perm=[0, 1, 3, 2])], "scores")
        weights = node("Softmax", [node("Add", [scores, mask], "masked")], "weights", axis=-1)
        context = node("MatMul", [weights, value], "context")
        if first_row:
            context = node("Flatten", [context], "merged", axis=1)
        else:
            context = node("Flatten", [node("Transpose", [context], "turned", perm=[0, 2, 1, 3])], "merged", axis=2)
        out = linear(context, "out", "out_bias", "attended")
    x = normed(added(rows, out, "out_bias", "attended_sum"), "attention_norm")
    fed = ""
    if "up" in tensors:
        op, attributes = ACTIVATIONS[common.activation]
        hidden = linear(x, "up", "up_bias", "raised")
        if op == "Swish":
            hidden = node("Mul", [hidden, node("Sigmoid", [hidden], "gate")], "hidden")
        else:
            hidden = node(op, [hidden], "hidden", **attributes)
        fed = linear(hidden, "down", "down_bias", "fed")
    return normed(added(x, fed, "down_bias", "fed_sum"), "ffn_norm")


def _constants(writer: Writer, prefix: str, name: str, *values: list[int]) -> list[str]:
    return [writer.tensor(f"{prefix}{name}.{i}", np.array(v, np.int64)) for i, v in enumerate(values)]
