"""A traced network, dense and cut, as an ONNX file on ONNX Runtime and OpenVINO: the same answers as torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paredown.anatomy import describe_graph
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.graph import trace
from paredown.importance import score_channels
from paredown.layers import macs, places_of
from paredown.planning import Product, channel_plan
from paredown.surgery import cut_graph
from paredown.targets import export_graph, graph_runner, onnxruntime, openvino
from paredown.types import Budget, Limits
from tests.contracts.networks import NETWORKS, example, network


@pytest.mark.parametrize("name", ["cifar-resnet20", "mobilenetv2", "unet", "shufflenet", "se-resnet"])
def test_every_engine_answers_alike(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    dense = trace(network(case), example(case))
    anatomy = describe_graph(dense)
    products = [Product(weight, shape, places) for weight, (shape, places) in places_of(dense).items()]
    plan = channel_plan(anatomy, score_channels(dense, anatomy, "l2"), Budget("macs", 0.6), products)
    small = cut_graph(dense, anatomy, plan)
    assert macs(small) <= 0.6 * macs(dense)
    path = export_graph(small, tmp_path / "small.onnx")
    openvino.export(path, tmp_path / "small.xml")
    runners = [graph_runner(small, threads=1), onnxruntime.load(path, threads=1)]
    runners += [openvino.load(tmp_path / "small.xml", threads=1)]
    for batch in (1, 5):
        x = example(case, batch).numpy()
        ours, *others = (runner.run({"pixel_values": x})["logits"] for runner in runners)
        with torch.no_grad():
            np.testing.assert_array_equal(ours, small(torch.from_numpy(x)).numpy())
        for other in others:
            np.testing.assert_allclose(other, ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())
    for runner in runners:
        runner.close()


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("name", ["vgg", "resnext", "densenet", "cifar-resnet20"])
def test_a_plan_costs_what_it_says(name: str, ranking: str, metric: str) -> None:
    case = NETWORKS[name]
    dense = trace(network(case), example(case))
    anatomy = describe_graph(dense)
    products = [Product(weight, shape, places) for weight, (shape, places) in places_of(dense).items()]
    scores = score_channels(dense, anatomy, "l2")

    def cost(model: torch.fx.GraphModule) -> float:
        table = places_of(model)
        return sum(float(np.prod(shape)) * (places if metric == "macs" else 1) for shape, places in table.values())

    first, last = anatomy.channels[0].name, anatomy.channels[-1].name
    for keep in (1.0, 0.7, 0.5):
        plan = channel_plan(anatomy, scores, Budget(metric, keep), products, ranking=ranking, protect=[first])
        small = cut_graph(dense, anatomy, plan)
        assert cost(small) <= keep * cost(dense) * (1 + 1e-9)
        assert keep < 1 or plan.keep == anatomy.identity()
        assert cost(small) > (keep - 0.25) * cost(dense)
        assert len(plan.keep[first]) == anatomy.group(first).units
    told = channel_plan(
        anatomy, scores, Budget(metric, 0.7), products, shares={last: 0.5}, limits=Limits(multiple_of=2)
    )
    assert len(told.keep[last]) == max(2, 2 * round(anatomy.group(last).units * 0.5 / 2))
    with pytest.raises(InfeasibleBudget):
        channel_plan(anatomy, scores, Budget(metric, 0.001), products, ranking=ranking)
    with pytest.raises(ParedownError, match="no group of channels 'nowhere'"):
        channel_plan(anatomy, scores, Budget(metric, 0.5), products, protect=["nowhere"])
