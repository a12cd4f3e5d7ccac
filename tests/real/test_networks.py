"""A real image classifier: what is left of it after branches went and the layers behind them were re-fitted."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, fx

from paredown.anatomy import describe_graph
from paredown.graph import trace
from paredown.recovery import refit_graph
from paredown.surgery import cut_graph
from paredown.tasks import image_classification as task
from paredown.types import BRANCHES, Plan
from tests.real import cifar_resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GONE = (10, 14)  # branches of the second stage, out of 27


def test_what_two_branches_lose_is_made_up_for(assets: Path) -> None:
    """Re-fitted on 256 pictures, without training: new pictures are answered nearly as by the dense network."""
    network = cifar_resnet.resnet56().eval()
    network.load_state_dict(load_file(assets / "models/cifar10-resnet56/model.safetensors"))
    train, test = (task.load(assets / "data/cifar10/cifar10.npz", part=part) for part in ("train", "test"))
    calibration, new = (
        list(torch.from_numpy(task.normalized(one.pixels[:count], MEAN, STD)).split(64))
        for one, count in ((train, 256), (test, 512))
    )
    dense = trace(network, calibration[0])
    anatomy = describe_graph(dense)
    stay = tuple(number for number in range(len(anatomy.branches)) if number not in GONE)
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), BRANCHES: stay})
    small = cut_graph(dense, anatomy, plan)
    fitted = refit_graph(small, teacher=dense, anatomy=anatomy, plan=plan, pictures=calibration)

    def answers(model: fx.GraphModule) -> Tensor:
        with torch.no_grad():
            return torch.cat([F.log_softmax(model(x.clone()), 1) for x in new])

    def divergence(model: fx.GraphModule) -> float:
        return float(F.kl_div(answers(model), answers(dense), log_target=True, reduction="batchmean"))

    def accuracy(model: fx.GraphModule) -> float:
        return float((answers(model).argmax(1).numpy() == test.labels[:512]).mean())

    assert divergence(fitted) < 0.3 * divergence(small)
    assert accuracy(dense) - accuracy(fitted) < 0.03
