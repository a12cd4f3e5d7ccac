"""What is a network's own in a bundle: its graph, cut again without weights, and its pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from paredown.anatomy import describe_graph
from paredown.bundle._format import GRAPH
from paredown.bundle._weights import assign, reading, stored, with_tied
from paredown.errors import BadData, CorruptBundle, FingerprintMismatch, UnsupportedModel
from paredown.graph import from_json
from paredown.networks import LoadedNetwork
from paredown.surgery import cut_graph
from paredown.tasks.image_classification import normalized
from paredown.types import Array, GraphAnatomy, Plan, Runner

INPUT = "pixel_values"


def about_network(loaded: LoadedNetwork, dense: fx.GraphModule) -> dict[str, Any]:
    """What a manifest tells of a network alone. Raises UnsupportedModel where it does not take pictures, BadData where
    it is not known how they are normalized, or where there are too few or too many names of classes.
    """
    shapes = [node.meta["shape"] for node in dense.graph.nodes if node.op == "placeholder"]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise UnsupportedModel(
            f"a bundle holds networks that take pictures [B, 3, H, W]; {loaded.source} takes {shapes}"
        )
    if loaded.mean is None or loaded.std is None:
        raise BadData(f"a bundle tells how pictures are normalized: state the mean and std of {loaded.source}")
    if len(loaded.mean) != 3 or len(loaded.std) != 3 or min(loaded.std) <= 0:
        raise BadData(f"mean and std are three numbers each, std above 0; got {loaded.mean} and {loaded.std}")
    answer: Any = dense.graph.output_node().args[0]
    shape = answer.meta["shape"]
    if loaded.labels and len(shape) == 2 and shape[1] != len(loaded.labels):
        raise BadData(f"{loaded.source} has {shape[1]} outputs and {len(loaded.labels)} names of classes")
    return {
        "source": Path(loaded.source).expanduser().resolve().name,  # a folder's own name: no path of this machine
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "size": list(shapes[0][2:]),
        "labels": {name: index for index, name in enumerate(_distinct(loaded.labels))} or None,
        "buffers": [name for name, tensor in dense.state_dict(keep_vars=True).items() if not _learns(tensor)],
    }


def _distinct(labels: Sequence[str]) -> list[str]:
    """The names, those that came before with their index behind them: ImageNet has two kinds of "crane"."""
    found: dict[str, None] = {}
    for index, label in enumerate(labels):
        while label in found:
            label = f"{label} ({index})"
        found[label] = None
    return list(found)


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def shell_of(
    nodes: Sequence[Mapping[str, Any]], plan: Plan, like: Mapping[str, Tensor], buffers: Collection[str]
) -> fx.GraphModule:
    """What the plan leaves of the graph, without weights; its tensors are of the kinds of those in `like`.

    Raises UnsupportedModel, FingerprintMismatch, and of a damaged graph anything.
    """
    dense = _dense(nodes, like, buffers)
    return cut_graph(dense, describe_graph(dense), plan)


def _dense(nodes: Sequence[Mapping[str, Any]], like: Mapping[str, Tensor], buffers: Collection[str]) -> fx.GraphModule:
    tensors: dict[str, Tensor] = {}
    for node in nodes:
        if node["op"] == "get_attr":
            name = node["target"]
            kind = like[name].dtype if name in like else torch.float32  # of a branch that is gone
            empty = torch.empty(node["shape"], dtype=kind, device="meta")
            tensors[name] = empty if name in buffers else nn.Parameter(empty)
    return from_json(nodes, tensors)


def open_network(folder: Path, manifest: Mapping[str, Any], plan: Plan) -> fx.GraphModule:
    """The cut network of a bundle, in eval mode. Raises CorruptBundle."""
    with reading(folder):
        state = stored(folder, manifest)
        like = with_tied(state, manifest["tied"])
    with _reading_graph(folder):
        shell = shell_of(_nodes(folder), plan, like, manifest["buffers"])
    with reading(folder):
        assign(shell, state, manifest["tied"])
    return shell.eval()


def open_anatomy(folder: Path, plan: Plan) -> GraphAnatomy:
    """What could be cut from the dense network. Raises CorruptBundle."""
    with _reading_graph(folder):
        anatomy = describe_graph(_dense(_nodes(folder), {}, ()))
        if anatomy.fingerprint != plan.fingerprint:
            raise FingerprintMismatch("it is another one than the plan cuts")
        return anatomy


def _nodes(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def _reading_graph(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever torch raises at operators and sizes that make no sense
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptBundle(f"{folder / GRAPH} is not the graph of this bundle's network: {reason[:300]}") from None


def predict_pictures(runner: Runner, pictures: object, manifest: Mapping[str, Any], batch_size: int) -> Array:
    """Logits [N, C] of uint8 pictures [N, H, W, 3], in their order. Raises BadData."""
    height, width = manifest["size"]
    wanted = f"predict takes uint8 pictures [N, {height}, {width}, 3] with at least one in it"
    try:
        pixels = np.asarray(pictures)
    except ValueError as error:  # pictures of several sizes
        raise BadData(f"{wanted}: {error}") from None
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3) or not len(pixels):
        raise BadData(f"{wanted}; these are {pixels.dtype} {list(pixels.shape)}")
    mean, std = manifest["mean"], manifest["std"]
    parts = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    return np.concatenate([next(iter(runner.run({INPUT: normalized(x, mean, std)}).values())) for x in parts])
