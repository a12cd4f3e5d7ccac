"""Closed-form re-fit, batch norm's statistics, and training of cut networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from paredown.anatomy import describe_graph
from paredown.errors import BadData
from paredown.graph import copied, in_training, operator_of, tensor_of, trace
from paredown.layers import layers_of
from paredown.recovery import _pictures as pictures
from paredown.recovery import refit_graph, train_on_pictures
from paredown.surgery import cut_graph, mask_graph
from paredown.tasks.image_classification import ImageData, normalized
from paredown.types import GraphAnatomy, Plan
from tests.contracts.networks import NETWORKS, example, network

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def halved(name: str, seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule, GraphAnatomy, Plan, list[Tensor]]:
    case = NETWORKS[name]
    model = trace(network(case), example(case))
    anatomy = describe_graph(model)
    rng = np.random.default_rng(seed)
    keep = {g.name: tuple(sorted(rng.permutation(g.units)[: -(-2 * g.units // 3)].tolist())) for g in anatomy.groups}
    plan = Plan(anatomy.fingerprint, keep)
    batches = [torch.randn(16, 3, case.size, case.size, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return model, cut_graph(model, anatomy, plan), anatomy, plan, batches


def distance(a: nn.Module, b: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([F.mse_loss(a(x.clone()), b(x.clone())) for x in batches]).mean())


@pytest.mark.parametrize("name", ["vgg", "cifar-resnet20", "mobilenetv2", "densenet", "se-resnet", "resnext", "unet"])
def test_a_refit_brings_it_nearer(name: str) -> None:
    model, small, anatomy, plan, batches = halved(name)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    fitted = refit_graph(small, teacher=model, anatomy=anatomy, plan=plan, pictures=batches)
    assert distance(fitted, model, batches) < 0.7 * distance(small, model, batches)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["cifar-resnet20", "mobilenetv2", "vgg", "densenet"])
def test_nothing_cut_is_left_as_it_is(name: str, weights: bool) -> None:
    """Statistics neither become those of a few pictures."""
    model, _, anatomy, _, batches = halved(name)
    plan = Plan(anatomy.fingerprint, anatomy.identity())
    fitted = refit_graph(
        copied(model), teacher=model, anatomy=anatomy, plan=plan, pictures=batches[:1], weights=weights
    )
    assert distance(fitted, model, batches) < 1e-6


def test_what_is_asked_for_is_in_terms_of_the_networks_own_norms() -> None:
    """After a training they are others than the dense network's."""
    model, _, anatomy, _, batches = halved("cifar-resnet20")
    plan, trained = Plan(anatomy.fingerprint, anatomy.identity()), copied(model)
    with torch.no_grad():
        for norm in [node for node in trained.graph.nodes if operator_of(node) == "batch_norm"]:
            gamma, beta, mean, var = (tensor_of(trained, one) for one in norm.args[1:5])
            scale = gamma / (var + norm.args[7]).sqrt()
            gamma.mul_(2)
            var.mul_(3)
            beta.add_(mean * (gamma / (var + norm.args[7]).sqrt() - scale))
    before = distance(trained, model, batches)
    fitted = refit_graph(trained, teacher=model, anatomy=anatomy, plan=plan, pictures=batches)
    assert distance(fitted, model, batches) < 1e-3 * before


class Plain(nn.Module):
    """A norm that only has statistics, one that has none, and linear layers on channels last that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.bare, self.without = nn.BatchNorm2d(12, affine=False), nn.BatchNorm2d(12, track_running_stats=False)
        self.up, self.down, self.last = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bare(self.one(x)))
        x = F.relu(x + self.without(self.two(x))).permute(0, 2, 3, 1)
        x = x + self.down(F.relu(self.up(x)))
        out: Tensor = self.last(x.mean((1, 2)))
        return out


def test_bare_norms_and_channels_last() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    model = trace(Plain().eval(), batches[0])
    anatomy = describe_graph(model)
    halves = {group.name: tuple(range(0, group.units, 2)) for group in anatomy.channels}
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), **halves})
    small = cut_graph(model, anatomy, plan)
    fitted = refit_graph(small, teacher=model, anatomy=anatomy, plan=plan, pictures=batches)
    assert distance(fitted, model, batches) < 0.5 * distance(small, model, batches)
    masked = mask_graph(model, anatomy, plan)
    with torch.no_grad():
        hints = pictures._hints(small, masked, anatomy, plan)
        assert {node: dim for node, (dim, _) in hints.items()} == {"conv2d_1": 1, "linear": -1, "linear_2": -1}
        assert float(pictures._divergence(small, masked, batches[0], hints)) < 1e-2 * pictures.HINTS  # in bfloat16


class TwoWays(nn.Module):
    """What the narrow way loses, the wide one beside it can make up for: both are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.beside = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.two(self.one(x)) + self.norm(self.beside(x)))).mean((2, 3))
        return out


def test_a_layer_makes_up_for_what_is_added_to_it() -> None:
    torch.manual_seed(0)
    net = TwoWays().eval()
    net.norm.weight.data, net.norm.bias.data = torch.rand(8) + 0.5, torch.randn(8)
    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    model = trace(net, batches[0])
    anatomy = describe_graph(model)
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "one": (3,)})
    small = cut_graph(model, anatomy, plan)
    settings: Any = {"teacher": model, "anatomy": anatomy, "plan": plan, "pictures": batches, "statistics": False}
    fitted = refit_graph(small, **settings)
    assert distance(fitted, model, batches) < 1e-3 * distance(small, model, batches)


def test_statistics_move_by_what_the_cut_changed() -> None:
    """Channels that stay come out of every norm with the moments that they have in the dense network."""
    model, small, anatomy, plan, batches = halved("cifar-resnet20")
    fitted = refit_graph(small, teacher=model, anatomy=anatomy, plan=plan, pictures=batches, weights=False)
    name = "layers.5.bn1.running_mean"
    assert not torch.allclose(fitted.get_buffer(name), small.get_buffer(name), rtol=1e-3)
    stay = torch.from_numpy(anatomy.kept(plan, name, 0, len(model.get_buffer(name))))
    ours, theirs = dict[str, Tensor](), dict[str, Tensor]()
    for net, seen in ((fitted, ours), (model, theirs)):
        for name, x in inputs_of_norms(net, torch.cat(batches)).items():
            mean, var = (net.get_buffer(f"{name}.running_{which}")[None, :, None, None] for which in ("mean", "var"))
            scaled = (x - mean) / var.sqrt()
            seen[name] = torch.stack([scaled.mean((0, 2, 3)), scaled.var((0, 2, 3))])
    torch.testing.assert_close(ours["layers.5.bn1"], theirs["layers.5.bn1"][:, stay], atol=1e-4, rtol=1e-4)
    assert torch.equal(fitted.get_parameter("linear.weight"), small.get_parameter("linear.weight"))
    with pytest.raises(BadData, match="no"):
        refit_graph(small, teacher=model, anatomy=anatomy, plan=plan, pictures=[])


def inputs_of_norms(model: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What every batch norm reads, by its name."""
    found = {}
    with torch.no_grad():
        work = fx.Interpreter(model, garbage_collect_values=False)
        work.run(x.clone())
        for node in model.graph.nodes:
            if operator_of(node) == "batch_norm":
                found[str(node.args[3].target).removesuffix(".running_mean")] = work.env[node.args[0]]
    return found


def test_only_some_layers() -> None:
    model, small, anatomy, plan, batches = halved("vgg")
    chosen = [layer.node for layer in layers_of(small)][1:3]
    fitted = refit_graph(small, teacher=model, anatomy=anatomy, plan=plan, pictures=batches, only=chosen)
    changed = {
        layer.node
        for layer in layers_of(small)
        if not torch.equal(fitted.get_parameter(layer.weight), small.get_parameter(layer.weight))
    }
    assert changed == set(chosen)


def stripes(count: int) -> ImageData:
    """Pictures of five kinds that anything convolutional can learn: stripes in one of five directions."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, count)
    y, x = np.mgrid[:16, :16]
    angle = (labels * np.pi / 5)[:, None, None]
    wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 6, (count, 1, 1)))
    pixels = np.clip(128 + 90 * wave[..., None] + rng.normal(0, 25, (count, 16, 16, 3)), 0, 255)
    return ImageData(pixels.astype(np.uint8), labels.astype(np.int64))


@pytest.mark.parametrize("objective", ["finetune", "distill"])
def test_training_learns_and_is_never_worse(objective: str, tmp_path: Path) -> None:
    model, small, *_ = halved("cifar-resnet20")
    data = stripes(600)
    trained, history = train_on_pictures(
        small, teacher=model, data=data, mean=MEAN, std=STD, steps=40, objective=objective, mirrored=False
    )
    assert history[-1].best < 0.8 * history[0].distance
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    untrained, history = train_on_pictures(small, teacher=model, data=data, mean=MEAN, std=STD, minutes=0.0)
    assert len(history) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(small.state_dict().values(), untrained.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="either steps or minutes"):
        train_on_pictures(small, teacher=model, data=data, mean=MEAN, std=STD)
    with pytest.raises(BadData, match="no pictures"):
        train_on_pictures(small, teacher=model, data=data.take([0]), mean=MEAN, std=STD, minutes=1)


def test_zeros_of_a_convolution_stay_zero() -> None:
    model, small, *_ = halved("cifar-resnet20")
    sparse = copied(small)
    weight = sparse.get_parameter("conv1.weight")
    weight.data[:, 1] = 0
    how: Any = {"mean": MEAN, "std": STD, "steps": 20, "objective": "finetune"}
    trained, _ = train_on_pictures(sparse, teacher=model, data=stripes(600), **how)
    assert not trained.get_parameter("conv1.weight")[:, 1].any()
    assert not torch.equal(trained.get_parameter("conv1.weight"), weight)


def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    model, small, *_ = halved("cifar-resnet20")
    settings = {"teacher": model, "data": stripes(300), "mean": MEAN, "std": STD, "steps": 12}
    place, steps = tmp_path / "state.safetensors", []

    def stop(progress: pictures.Progress) -> None:
        steps.append(progress.step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on_pictures(small, **settings, checkpoint=place, report=stop)  # type: ignore[arg-type]
    assert place.is_file()
    _, history = train_on_pictures(small, **settings, checkpoint=place)  # type: ignore[arg-type]
    assert history[-1].step == 12
    _, history = train_on_pictures(small, **settings, checkpoint=place)  # type: ignore[arg-type]
    assert history[-1].step == 12


@pytest.mark.parametrize("name", ["cifar-resnet20", "resnet50", "densenet", "vgg", "mobilenetv2", "se-resnet"])
def test_hints_compare_what_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network with its consumers zeroed makes, in all channels that are left, what the cut one makes."""
    model, small, anatomy, plan, batches = halved(name)
    masked = mask_graph(model, anatomy, plan)
    hints = pictures._hints(small, masked, anatomy, plan)
    assert hints
    monkeypatch.setattr(pictures, "has_bfloat16", lambda: False)
    with torch.no_grad():
        assert float(pictures._divergence(small, masked, batches[0], hints)) < 1e-6 * pictures.HINTS
        assert float(pictures._divergence(small, model, batches[0], hints)) > 1e-3 * pictures.HINTS


def test_a_distillation_with_hints_comes_nearer_between_the_layers() -> None:
    _, _, anatomy, plan, _ = halved("cifar-resnet20")
    case, data = NETWORKS["cifar-resnet20"], stripes(600)
    torch.manual_seed(0)
    model = trace(case.make(), example(case))
    x = torch.from_numpy(normalized(data.pixels[:64], MEAN, STD))
    with torch.no_grad():
        for _ in range(60):  # statistics that are those of the data, as a trained network's are
            in_training(model)(x)
    small = cut_graph(model, anatomy, plan)
    how: Any = {"teacher": model, "data": data, "mean": MEAN, "std": STD, "steps": 25, "seed": 1}
    hints = pictures._hints(small, model, anatomy, plan)

    def apart(one: fx.GraphModule) -> float:
        with torch.no_grad():
            return float(pictures._divergence(one, model, x, hints))

    trained, _ = train_on_pictures(small, **how, anatomy=anatomy, plan=plan)
    assert apart(trained) < 0.8 * apart(small)


def test_mixed_with_the_next_one() -> None:
    x = torch.eye(40).reshape(40, 1, 5, 8).expand(-1, 3, -1, -1)
    mixtures = pictures.mixed(x, torch.Generator().manual_seed(0))[:, 0].flatten(1)
    own, other = mixtures.diagonal(), torch.stack([mixtures[i, i - 1] for i in range(40)])
    torch.testing.assert_close(own + other, torch.ones(40))
    assert own.min() >= 1 - pictures.MOST_MIXED
    assert own.std() > 0.1


def test_shifted_and_mirrored() -> None:
    x = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16) + 1
    many = pictures.augmented(x.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    straight = pictures.augmented(x.expand(200, -1, -1, -1), torch.Generator().manual_seed(0), mirrored=False)
    padded = F.pad(x, (2, 2, 2, 2))
    windows = [padded[0, :, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    assert all(any(torch.equal(one, w) for w in windows) for one in straight)
    assert all(any(torch.equal(one, w) or torch.equal(one, w.flip(-1)) for w in windows) for one in many)
    assert len({one.numpy().tobytes() for one in straight}) == 25
    assert 30 < sum(bool(one[0].diff(dim=1).sum() < 0) for one in many) < 170
