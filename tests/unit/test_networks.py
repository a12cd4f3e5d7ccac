"""Networks loaded by a function's name, and from folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from paredown.anatomy import describe_graph
from paredown.errors import UnsupportedModel
from paredown.graph import from_json, to_json, trace
from paredown.networks import _preprocessing, is_network, load_network
from paredown.surgery import cut_graph, mask_graph
from paredown.tasks.image_classification import normalized
from paredown.types import Plan

CODE = """
from torch import fx, nn
def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
def number():
    return 3
def broken():
    raise RuntimeError("no such thing")
def stops():
    raise SystemExit("usage: train.py")
def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_networks.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def test_a_function_and_its_weights(mine: Path) -> None:
    found = load_network("my_networks:small", weights=mine / "weights.safetensors")
    assert not found.module.training and found.mean is None
    x = torch.randn(2, 3, 8, 8)
    assert trace(found.module, x)(x).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("my_networks:small", None, "needs its weights"),
        ("my_networks:small", "weights.pth", "is a pickle"),
        ("my_networks:small", "nowhere.safetensors", "not a readable safetensors"),
        ("my_networks:small", "other.safetensors", "lacks '0.bias'"),
        ("my_networks:small", "wrong.safetensors", "in another shape '0.bias'"),
        ("my_networks:small", "more.safetensors", "the network has not, 'extra'"),
        ("my_networks:number", "weights.safetensors", "gives a int"),
        ("my_networks:broken", "weights.safetensors", "no such thing"),
        ("my_networks:stops", "weights.safetensors", "SystemExit: usage"),
        ("my_networks:lazy", "weights.safetensors", "lazy modules"),
        ("my_networks:none", "weights.safetensors", "gives no network"),
        ("no_such_module:small", "weights.safetensors", "gives no network"),
        (".", "weights.safetensors", "goes with package.module:factory"),
        (".", None, "no config.json"),
    ],
)
def test_what_is_no_network_is_said(mine: Path, name: str, weights: str | None, said: str) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).state_dict()
    save_file({"3.weight": state["3.weight"]}, mine / "other.safetensors")
    save_file({**state, "0.bias": torch.zeros(5)}, mine / "wrong.safetensors")
    save_file({**state, "extra": torch.zeros(5)}, mine / "more.safetensors")
    with pytest.raises(UnsupportedModel, match=said):
        load_network(name, weights=None if weights is None else mine / weights)


def test_what_export_cannot_follow_is_traced_by_fx(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_graphs_alone(module: nn.Module, *told: Any, own: Any = torch.export.export, **options: Any) -> Any:
        if not isinstance(module, fx.GraphModule):
            raise RuntimeError("cannot follow this")
        return own(module, *told, **options)

    monkeypatch.setattr(torch.export, "export", of_graphs_alone)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    x = torch.randn(3, 3, 8, 8)
    graph = trace(module, x[:2])
    torch.testing.assert_close(graph(x), module(x))
    assert dict(graph.named_parameters()).keys() == dict(module.named_parameters()).keys()

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UnsupportedModel, match="Branching cannot be traced: cannot follow this"):
        trace(Branching(), x)


def config_of(kind: str) -> Any:
    from transformers import ConvNextConfig, MobileNetV2Config, RegNetConfig, ResNetConfig

    return {
        "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic"),
        "bottleneck": ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2]),
        "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5),
        "mobilenetv2": MobileNetV2Config(depth_multiplier=0.25, min_depth=8),
        "regnet": RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    }[kind]


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "convnext", "mobilenetv2", "regnet"])
def test_a_folder_of_transformers_is_cut_as_it_is_masked(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config_of(kind))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    told = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "size": {"shortest_edge": 64}}
    told["crop_pct"] = 0.875
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    found = load_network(str(tmp_path))
    assert (found.mean, found.std, found.size, found.middle) == ((0.5,) * 3, (0.2,) * 3, (64, 64), 0.875)
    assert found.labels == ()  # nobody named them
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    traced = trace(found.module.double(), x)
    torch.testing.assert_close(traced(x), found.module(x))
    anatomy = describe_graph(traced)
    exact = [group for group in anatomy.groups if group.exact]
    assert exact
    keep = anatomy.identity() | {group.name: tuple(range(0, group.units, 2)) for group in exact}
    plan = Plan(anatomy.fingerprint, keep)
    small, masked = cut_graph(traced, anatomy, plan), mask_graph(traced, anatomy, plan)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in traced.parameters())


@pytest.mark.parametrize("told", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}])
def test_pictures_are_normalized_as_the_preprocessor_does(told: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **told}))
    found = _preprocessing(path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    processor = ViTImageProcessor(**json.loads(path.read_text()), do_resize=False)
    wanted = np.stack(processor(list(pixels), return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(normalized(pixels, found["mean"], found["std"]), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("told", "size", "middle"),
    [
        ({}, None, 1.0),
        ({"size": 24}, (24, 24), 1.0),
        ({"size": {"height": 24, "width": 32}}, (24, 32), 1.0),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}, (24, 24), 0.75),
        ({"size": {"shortest_edge": 32}, "crop_size": 24, "do_center_crop": False}, (32, 32), 1.0),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875}, (28, 28), 0.875),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), 1.0),
    ],
)
def test_pictures_are_cropped_as_the_preprocessor_does(
    told: dict[str, Any], size: tuple[int, int] | None, middle: float, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(told))
    found = _preprocessing(path)
    assert (found["size"], found["middle"]) == (size, middle)


def test_a_folder_without_all_weights(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in state.items() if "classifier" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"lacks weights: no tensor 'classifier.*2 missing"):
        load_network(str(tmp_path))


def test_tracing_changes_nothing_of_the_module() -> None:
    """Not even where a part of it is in eval mode, as frozen batch norm is."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).train()
    module[1].eval()
    trace(module, torch.zeros(2, 3, 8, 8))
    assert [one.training for one in module] == [True, False, True, True]
    with pytest.raises(UnsupportedModel, match=r"a torch.nn.Module is wanted, and a dict is given"):
        trace({}, torch.zeros(2, 3, 8, 8))  # type: ignore[arg-type]


def test_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UnsupportedModel, match=r"no model\.safetensors"):
        load_network(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_network(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "task", "config", "expected"),
    [
        ("my_networks:small", None, None, True),
        ("my_networks:small", "text-classification", None, True),
        ("folder", None, {"architectures": ["ResNetForImageClassification"]}, True),
        ("folder", None, {"architectures": ["BertForSequenceClassification"]}, False),
        ("folder", None, {"architectures": None}, False),
        ("folder", None, None, False),
        ("fol:der", None, {"architectures": ["BertModel"]}, False),
        ("folder", "image-classification", None, True),
        ("org/model", None, None, False),
    ],
)
def test_what_stands_for_an_image_classifier(
    tmp_path: Path, name: str, task: str | None, config: dict[str, Any] | None, expected: bool
) -> None:
    place = tmp_path / name
    if config is not None:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
    assert is_network(str(place) if config is not None else name, task) is expected


@pytest.mark.parametrize("kind", ["placeholder", "get_attr"])
def test_a_graph_holds_only_names(kind: str) -> None:
    """torch.fx writes them into the Python that it executes."""
    model = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.rand(2, 3, 6, 6))
    nodes, tensors = to_json(model), dict(model.state_dict())
    torch.testing.assert_close(from_json(nodes, tensors)(torch.ones(1, 3, 6, 6)), model(torch.ones(1, 3, 6, 6)))
    changed = next(node for node in nodes if node["op"] == kind)
    tensors["a\nprint(1)"] = tensors.get(changed["target"], torch.zeros(1))
    changed["target"] = "a\nprint(1)"
    with pytest.raises(UnsupportedModel, match="no name"):
        from_json(nodes, tensors)
