"""Graphs of other widths for timing: the operators of a real export with weights that mean nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.files import replacing
from paredown.targets._lean import METADATA, Shared, swap_layers
from paredown.targets._tokens import METADATA as TOKENS_METADATA
from paredown.types import Array


def probe(path_in: Path, path_out: Path, widths: Sequence[tuple[int, int]]) -> Path:
    """`path_out`: the export at `path_in` with one layer of (heads, neurons) per entry of `widths`, to be TIMED only.

    0 heads or 0 neurons leave the sub-layer out. `path_in` must be an export of `targets.onnxruntime` whose layers
    have heads and neurons. The weights are rows of its own, repeated or cut off, so that their sizes are natural.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtra("onnx", "onnx") from error
    model = onnx.load(os.fspath(path_in))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if TOKENS_METADATA in metadata:
        raise ParedownError(f"{path_in} drops tokens between its layers; make probes from the export without a policy")
    if METADATA not in metadata:
        raise ParedownError(f"{path_in} was not written by paredown's ONNX export, so its widths cannot be changed")
    common = Shared.from_json(metadata[METADATA])
    graph = model.graph
    dense: dict[int, dict[str, Array]] = {}
    for tensor in graph.initializer:
        if (match := _TENSOR.fullmatch(tensor.name)) is not None:
            dense.setdefault(int(match[1]), {})[match[2]] = numpy_helper.to_array(tensor)
    sources = [dense[i] for i in sorted(dense)]
    if not all("out" in source and "up" in source for source in sources):
        raise ParedownError(f"a probe needs a dense export, and in {path_in} some sub-layers are gone already")
    if not widths or min(min(pair) for pair in widths) < 0:
        raise ParedownError(f"a probe needs one layer at least and widths of 0 or more; got {list(widths)}")
    chosen = [sources[min(i, len(sources) - 1)] for i in range(len(widths))]
    if common.first_row:  # the last layer has its own form
        chosen = [sources[min(i, max(0, len(sources) - 2))] for i in range(len(widths) - 1)] + [sources[-1]]
        if len(widths) > 1 and len(sources) == 1:
            raise ParedownError(f"{path_in} has one layer only, so a probe of it has one at most")
    layers = [_resized(*pair, common=common) for pair in zip(chosen, widths, strict=True)]
    swap_layers(graph, layers, common)
    with replacing(Path(path_out)) as beside:
        onnx.save(model, os.fspath(beside))
    return Path(path_out)


_PARTS = (
    "query query_bias kv qkv qkv_bias out out_bias up up_bias down down_bias bias_heads "
    "attention_norm.weight attention_norm.bias ffn_norm.weight ffn_norm.bias"
)
_TENSOR = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _PARTS.split()))})")


def _resized(dense: dict[str, Array], width: tuple[int, int], *, common: Shared) -> dict[str, Array]:
    heads, neurons = width
    inner = heads * common.head_dim
    rows = {"query": inner, "query_bias": inner, "kv": 2 * inner, "qkv": 3 * inner, "qkv_bias": 3 * inner}
    rows |= {"up": neurons, "up_bias": neurons}
    columns = {"out": inner, "down": neurons}
    gone = set() if heads else {"query", "query_bias", "kv", "qkv", "qkv_bias", "out", "bias_heads"}
    gone |= set() if neurons else {"up", "up_bias", "down"}
    layer: dict[str, Array] = {}
    for name, tensor in dense.items():
        if name in gone:
            continue
        if name in rows:
            tensor = tensor[np.arange(rows[name]) % len(tensor)]
        elif name in columns:
            tensor = np.ascontiguousarray(tensor[:, np.arange(columns[name]) % tensor.shape[1]])
        layer[name] = tensor
    own = dense["out"].shape[1] // common.head_dim
    if common.position_bias and 0 < heads != own:  # fewer heads gather their own position biases
        layer["bias_heads"] = np.arange(heads, dtype=np.int64) % own
    return layer
