"""Bundles of small cut networks, for the tests of the artefact and for the golden file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from paredown.anatomy import describe_graph
from paredown.bundle import Bundle, save_network
from paredown.graph import operator_of, trace
from paredown.networks import LoadedNetwork
from paredown.surgery import cut_graph
from paredown.targets import export_graph, openvino
from paredown.tasks.image_classification import normalized
from paredown.types import Array, GraphAnatomy, Plan
from tests.contracts.networks import NETWORKS, example, network

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
CLASSES = ("crane", "dog", "crane", "ship", "cat")  # ImageNet too has two of one name
LABELS = {"crane": 0, "dog": 1, "crane (2)": 2, "ship": 3, "cat": 4}


def plan_of(anatomy: GraphAnatomy) -> Plan:
    """Every exact group without its first unit and every fourth one; the last residual branch gone."""
    keep = anatomy.identity()
    for group in anatomy.groups:
        units = range(group.units)
        if group.kind == "branch":
            keep[group.name] = tuple(units)[:-1]
        elif group.exact:
            keep[group.name] = tuple(unit for unit in units if unit and unit % 4 != 3) or (0,)
    return Plan(anatomy.fingerprint, keep, "a test")


def parts(
    name: str, *, labels: Sequence[str] = CLASSES, source: str = "tests.contracts.networks:make"
) -> dict[str, Any]:
    """The arguments of `save_network` for a cut network of that name."""
    case = NETWORKS[name]
    module = network(case)
    x = torch.from_numpy(normalized(pictures(name, 32), MEAN, STD))
    _take_statistics(module, x)
    dense = trace(module, example(case))
    anatomy = describe_graph(dense)
    plan = plan_of(anatomy)
    loaded = LoadedNetwork(source, module, MEAN, STD, None, tuple(labels))
    same = {"dense": dense, "anatomy": anatomy, "plan": plan, "loaded": loaded, "target": "torch", "accepted": True}
    model = cut_graph(dense, anatomy, plan)
    _balance(model, x)
    return {**same, "model": model}


def _take_statistics(module: nn.Module, x: Tensor) -> None:
    """Batch norm's statistics are those of the pictures: others let no picture through to the answer."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        module.train()(x)
    module.eval()
    for norm, one in zip(norms, momentum, strict=True):
        norm.momentum = one


def _balance(model: fx.GraphModule, x: Tensor) -> None:
    """No class is likelier than another: else every picture would be of the same one."""
    last: Any = model.graph.output_node().args[0]
    if operator_of(last) == "linear":
        with torch.no_grad():
            model.get_parameter(last.args[2].target).sub_(model(x).mean(0))


def export(model: fx.GraphModule, work: Path) -> dict[str, Path]:
    """The files that serve, written under `work`, by their names in a bundle."""
    (work / "openvino").mkdir(parents=True, exist_ok=True)
    (work / "report.html").write_text("<!doctype html><title>report</title>\n", encoding="utf-8")
    export_graph(model, work / "model.onnx")
    openvino.export(work / "model.onnx", work / "openvino" / "model.xml")
    names = ("report.html", "model.onnx", "openvino/model.xml", "openvino/model.bin")
    return {name: work / name for name in names}


def make(
    folder: Path,
    name: str = "resnet18",
    *,
    exported: bool = False,
    work: Path | None = None,
    change: Callable[[dict[str, Any]], object] = lambda arguments: None,
    **how: Any,
) -> Bundle:
    """A bundle at `folder` of a cut network; `exported`: with files for every target, of which ONNX Runtime serves."""
    arguments = parts(name, **how)
    if exported:
        work = work or folder.parent / f"{folder.name}-work"
        arguments |= {"files": export(arguments["model"], work), "target": "onnxruntime"}
    change(arguments)
    return save_network(folder, **arguments, report={"accepted": True, "speedup": {"value": 2.0}})


def pictures(name: str, count: int = 5) -> Array:
    """uint8 [N, H, W, 3], each of a colour of its own: noise alone is the same to a network."""
    size, rng = NETWORKS[name].size, np.random.default_rng(0)
    noise = rng.integers(0, 64, (count, size, size, 3))
    return (rng.integers(0, 192, (count, 1, 1, 3)) + noise).astype(np.uint8)


def answers_of(bundle: Bundle, pixels: Array, target: str) -> Array:
    """What one of the bundle's files computes of the pictures, as `predict` would if that file served."""
    runner = bundle.runner(target=target, threads=1)
    try:
        return runner.run({"pixel_values": normalized(pixels, MEAN, STD)})["logits"]
    finally:
        runner.close()
