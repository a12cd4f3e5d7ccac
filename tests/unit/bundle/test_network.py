"""A bundle of a traced network: what it holds and answers, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paredown.bundle import MANIFEST, Bundle, load, save_network, torch_runner
from paredown.errors import BadData, CorruptBundle, FingerprintMismatch, ParedownError, UnsupportedModel
from paredown.graph import copied, in_training, trace
from paredown.tasks.image_classification import normalized
from paredown.types import Array, Plan
from tests.contracts.network_bundles import CLASSES, LABELS, MEAN, STD, make, parts, pictures
from tests.unit.bundle.conftest import content, edit, refused

GRAPH, WEIGHTS = "graph.json", "model.safetensors"
Nodes = list[dict[str, Any]]


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    return make(tmp_path / "place" / "slim")


@pytest.fixture
def arguments() -> dict[str, Any]:
    return parts("resnet18")


def rewrite(folder: Path, change: Callable[[Nodes], object]) -> Bundle:
    """The bundle with another graph, opened without a look at its sha256."""
    nodes = json.loads((folder / GRAPH).read_text())
    change(nodes)
    (folder / GRAPH).write_text(json.dumps(nodes))
    return load(folder, verify=False)


def first(nodes: Nodes, **of: str) -> dict[str, Any]:
    return next(node for node in nodes if all(node[key] == value for key, value in of.items()))


# ---------------------------------------------------------------------------------------------------------- what it is


def test_the_manifest_tells_what_the_bundle_is(made: Bundle) -> None:
    manifest = made.manifest
    assert json.loads((made.folder / MANIFEST).read_text()) == manifest
    assert (manifest["format"], manifest["family"], manifest["task"]) == (4, "graph", "image-classification")
    assert (manifest["mean"], manifest["std"], manifest["size"]) == ([*MEAN], [*STD], [16, 16])
    assert manifest["labels"] == LABELS and manifest["source"] == "tests.contracts.networks:make"
    assert (manifest["target"], manifest["precision"], manifest["file"]) == ("torch", "fp32", WEIGHTS)
    assert "bn1.running_mean" in manifest["buffers"] and "bn1.weight" not in manifest["buffers"]
    assert not {"config", "pooling", "normalize", "max_length", "folds", "tokens", "compressed"} & set(manifest)
    assert (
        set(manifest["files"]) == {GRAPH, WEIGHTS, "plan.json", "report.json"} == {*content(made.folder)} - {MANIFEST}
    )


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    made = make(tmp_path / "slim", source=str(tmp_path / "models" / "resnet"))
    assert made.manifest["source"] == "resnet"
    for name in (MANIFEST, "plan.json", GRAPH):
        assert str(tmp_path) not in (made.folder / name).read_text()


def test_an_older_bundle_is_replaced_whole(made: Bundle) -> None:
    before = content(made.folder)
    again = make(made.folder, "vgg")
    assert load(made.folder) == again and content(made.folder).keys() == before.keys()
    assert list(made.folder.parent.iterdir()) == [made.folder]
    (made.folder / "notes.txt").write_text("mine")
    refused(lambda: make(made.folder), "notes.txt", kind=BadData)


def test_it_answers_pictures_in_their_order(made: Bundle) -> None:
    pixels = pictures("resnet18", 7)
    out = made.predict(pixels, batch_size=3)
    assert out.shape == (7, 5) and out.dtype == np.float32
    np.testing.assert_allclose(made.predict(pixels[::-1]), out[::-1], atol=1e-5)
    np.testing.assert_allclose(made.predict(list(pixels)), out, atol=1e-5)
    with torch.no_grad():
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
            STD
        ).view(3, 1, 1)
        np.testing.assert_allclose(made.model()(x), out, atol=1e-4)
    runner = torch_runner(str(made.folder), threads=torch.get_num_threads())
    np.testing.assert_allclose(runner.run({"pixel_values": normalized(pixels, MEAN, STD)})["logits"], out, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 3, 16, 16), np.uint8),
        np.zeros((2, 8, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        [np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)],
        ["a text"],
        [],
        None,
    ],
)
def test_other_things_than_its_pictures_are_refused(wrong: Any, made: Bundle) -> None:
    refused(lambda: made.predict(wrong), "uint8 pictures [N, 16, 16, 3]", kind=BadData)


def test_labels_are_the_classes_or_their_numbers(made: Bundle, tmp_path: Path) -> None:
    outputs = np.array([[3, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 0, 0, 0, 1]])
    assert made.labels_of(outputs) == ["crane", "crane (2)", "cat"]
    nameless = make(tmp_path / "other", labels=())
    assert nameless.manifest["labels"] is None and nameless.labels_of(outputs) == ["0", "2", "4"]
    refused(lambda: made.labels_of(outputs[0]), "outputs [N, C]", kind=BadData)


def test_what_a_network_does_not_have_is_said(made: Bundle) -> None:
    refused(made.tokenizer, "takes pictures", "no tokenizer")
    refused(made.network, "takes pictures", "model()")
    refused(lambda: made.token_policy, "no token policy")
    refused(made.token_tensors, "no token policy")
    refused(lambda: made.runner(target="onnxruntime"), "no fp32 file for onnxruntime", "it has torch fp32")
    refused(lambda: made.runner(target="torch", precision="bf16"), "no bf16 file for torch")
    refused(lambda: made.runner(target="sparse_cpu"), "sparse_cpu")


def test_it_can_be_trained_further(made: Bundle) -> None:
    model = made.model()
    in_training(model)(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------- what is written


def test_zeros_are_stored_as_bits(arguments: dict[str, Any], tmp_path: Path) -> None:
    with torch.no_grad():
        weight = arguments["model"].get_parameter("layers.2.conv1.weight")
        weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    saved = save_network(tmp_path / "slim", **arguments)
    assert saved.manifest["format"] == 4 and list(saved.manifest["compressed"]) == ["layers.2.conv1.weight"]
    assert torch.equal(load(saved.folder).model().get_parameter("layers.2.conv1.weight"), weight)


class Odd(nn.Module):
    """A branch that reads whole numbers, another that does not, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 4, 5, 6, 7]), persistent=False)
        self.scale = torch.full((4,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))[:, self.order]
        out: torch.Tensor = self.last(x.mean((2, 3))) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return out


@pytest.mark.parametrize("gone", [False, True])
def test_whole_numbers_and_constants_come_back(gone: bool, arguments: dict[str, Any], tmp_path: Path) -> None:
    from paredown.anatomy import describe_graph
    from paredown.surgery import cut_graph

    dense = trace(Odd(), torch.randn(2, 3, 8, 8))
    anatomy = describe_graph(dense)
    keep = anatomy.identity() | ({"branches": ()} if gone else {})
    plan = Plan(anatomy.fingerprint, keep)
    small = cut_graph(dense, anatomy, plan)
    loaded = dataclasses.replace(arguments["loaded"], labels=("a", "b", "c", "d"))
    arguments |= {"dense": dense, "anatomy": anatomy, "plan": plan, "model": small, "loaded": loaded}
    again = save_network(tmp_path / "slim", **arguments).model()
    assert ("order" in again.state_dict()) != gone
    assert gone or again.get_buffer("order").dtype == torch.int64
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(again(x), small(x))


def test_a_frozen_or_half_precise_network_is_the_same_one(arguments: dict[str, Any], tmp_path: Path) -> None:
    frozen = copied(arguments["model"]).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    again = save_network(tmp_path / "slim", **{**arguments, "model": frozen}).model()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    half = save_network(tmp_path / "half", **{**arguments, "model": frozen.half()}).model()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


def test_model_and_plan_must_belong_together(arguments: dict[str, Any], tmp_path: Path) -> None:
    plan: Plan = arguments["plan"]

    def other(**changes: Any) -> None:
        refused(lambda: save_network(tmp_path / "slim", **{**arguments, **changes}), kind=FingerprintMismatch)
        assert not (tmp_path / "slim").exists()

    other(plan=Plan(plan.fingerprint, {**plan.keep, "conv1": (0,)}))
    other(plan=Plan(plan.fingerprint, {**plan.keep, "nowhere": (0,)}))
    other(plan=dataclasses.replace(plan, fingerprint="0" * 64))
    other(anatomy=dataclasses.replace(arguments["anatomy"], fingerprint="0" * 64))
    other(model=arguments["dense"])
    other(model=in_training(arguments["model"]))
    other(dense=parts("vgg")["dense"])


def test_what_pictures_are_like_must_be_known(arguments: dict[str, Any], tmp_path: Path) -> None:
    loaded = arguments["loaded"]

    def other(*words: str, kind: type[ParedownError] = BadData, **changes: Any) -> None:
        given = {**arguments, "loaded": dataclasses.replace(loaded, **changes)}
        refused(lambda: save_network(tmp_path / "slim", **given), *words, kind=kind)

    other("mean and std", loaded.source, mean=None)
    other("mean and std", std=None)
    other("three numbers", std=(1.0, 0.0, 1.0))
    other("three numbers", mean=(0.5,))
    other("5 outputs", "4 names", labels=CLASSES[:4])
    gray = trace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5)), torch.randn(2, 1, 8, 8))
    arguments["dense"] = gray
    other("take pictures [B, 3, H, W]", "(2, 1, 8, 8)", kind=UnsupportedModel)


def test_files_have_names_of_their_own(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    call = lambda **more: refused(lambda: save_network(tmp_path / "slim", **{**arguments, **more}), "needs the file")  # noqa: E731
    call(target="onnxruntime")
    call(target="openvino")
    files = {GRAPH: tmp_path / "x"}
    refused(lambda: save_network(tmp_path / "slim", **arguments, files=files), GRAPH, "cannot be the name")
    arguments["target"] = "sparse_cpu"
    refused(lambda: save_network(tmp_path / "slim", **arguments), "no file serves fp32 on sparse_cpu", "openvino bf16")


# ------------------------------------------------------------------------------------------------------ what is damaged


def test_a_manifest_made_by_hand_is_checked(made: Bundle) -> None:
    whole = (made.folder / MANIFEST).read_bytes()
    for key in set(made.manifest) - {"format", "self", "family"}:
        edit(made.folder, lambda manifest: manifest.pop(key))  # noqa: B023
        refused(lambda: load(made.folder), repr(key), kind=CorruptBundle)
        (made.folder / MANIFEST).write_bytes(whole)
    wrong: dict[str, list[Any]] = {
        "mean": [[0.5, 0.5], ["a", 0.5, 0.5], [True, 0, 0]],
        "std": [[0.5, 0.0, 0.5], [1, 1, 1, 1], [0.5, None, 0.5]],
        "size": [[16], [16, 0], [16.0, 16], ["16", "16"]],
        "buffers": [[1], "bn1.running_mean"],
        "labels": [{"a": "0"}, []],
    }
    for key, values in wrong.items():
        for value in values:
            edit(made.folder, lambda manifest: manifest.update({key: value}))  # noqa: B023
            refused(lambda: load(made.folder), repr(key), kind=CorruptBundle)
            (made.folder / MANIFEST).write_bytes(whole)
    edit(made.folder, lambda manifest: manifest["files"].pop(GRAPH))
    refused(lambda: load(made.folder), f"does not list {GRAPH}", kind=CorruptBundle)


def _pop(key: str) -> Callable[[Nodes], object]:
    return lambda nodes: nodes[3].pop(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes.clear(),
        lambda nodes: nodes.append(3),
        lambda nodes: nodes.pop(),
        lambda nodes: nodes.pop(0),
        lambda nodes: nodes.reverse(),
        *map(_pop, ("name", "op", "target", "args", "kwargs", "shape")),
        lambda nodes: first(nodes, target="aten.linear.default").update(target="aten.linear.nothing"),
        lambda nodes: first(nodes, target="aten.linear.default").update(target="os.system.default"),
        lambda nodes: first(nodes, target="aten.linear.default").update(target="aten.relu.default"),
        lambda nodes: first(nodes, target="aten.linear.default").update(op="call_module"),
        lambda nodes: first(nodes, op="get_attr").update(shape=[1]),
        lambda nodes: first(nodes, op="get_attr").update(target="nowhere.weight"),
        lambda nodes: first(nodes, op="placeholder").update(shape=[2, 3]),
        lambda nodes: first(nodes, op="output").update(args=[{"node": "nobody"}]),
    ],
)
def test_a_damaged_graph_is_one_sentence(change: Callable[[Nodes], object], made: Bundle) -> None:
    bundle = rewrite(made.folder, change)
    refused(bundle.model, GRAPH, "not the graph", kind=CorruptBundle)
    refused(lambda: bundle.predict(pictures("resnet18")), GRAPH, kind=CorruptBundle)


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '"nodes"', "null"])
def test_what_is_no_graph_is_one_sentence(text: str, made: Bundle) -> None:
    (made.folder / GRAPH).write_text(text)
    bundle = load(made.folder, verify=False)
    refused(bundle.model, GRAPH, kind=CorruptBundle)
    refused(bundle.anatomy, GRAPH, kind=CorruptBundle)


def test_a_graph_runs_no_code(made: Bundle, tmp_path: Path) -> None:
    """torch.fx writes names into the source that it executes."""
    there = tmp_path / "it-ran"
    code = f'__import__("pathlib").Path({str(there)!r}).touch()'
    quoted = code.replace('"', '\\"')

    def tensor(nodes: Nodes, name: str) -> None:
        first(nodes, op="get_attr")["target"] = name

    changes: list[Callable[[Nodes], object]] = [
        lambda nodes: first(nodes, op="placeholder").update(target=f"x={code}"),
        lambda nodes: tensor(nodes, f'a", {code}) or ("'),
        lambda nodes: tensor(nodes, f"a\\', {quoted}"),
        lambda nodes: tensor(nodes, f"a\n{code}"),
        lambda nodes: first(nodes, target="aten.linear.default").update(kwargs={f"x={code}, y": 1}),
        lambda nodes: nodes[5].update(name=f"a\n{code}"),
        lambda nodes: first(nodes, target="aten.linear.default").update(
            target="aten.from_file.default", args=[str(there), True, 4, None, None, None, None]
        ),
    ]
    whole = (made.folder / GRAPH).read_bytes()
    for change in changes:
        for call in (lambda bundle: bundle.predict(pictures("resnet18")), lambda bundle: bundle.anatomy()):
            bundle = rewrite(made.folder, change)
            try:
                call(bundle)
            except CorruptBundle as error:
                assert GRAPH in str(error)
            assert not there.exists()
            (made.folder / GRAPH).write_bytes(whole)


def test_weights_that_do_not_fit_are_one_sentence(made: Bundle) -> None:
    path = made.folder / WEIGHTS
    whole: dict[str, Any] = load_file(path)

    def other(tensors: dict[str, Any]) -> None:
        save_file(tensors, path)
        refused(load(made.folder, verify=False).model, str(made.folder), kind=CorruptBundle)

    other({name: tensor for name, tensor in whole.items() if name != "linear.weight"})
    other({**whole, "more": torch.zeros(3)})
    other({**whole, "linear.weight": torch.zeros(5, 99)})
    other({**whole, "linear.weight": whole["linear.weight"].to(torch.int32)})
    path.write_bytes(b"nothing")
    refused(load(made.folder, verify=False).model, WEIGHTS, kind=CorruptBundle)
    save_file(whole, path)
    edit(made.folder, lambda manifest: manifest.update(tied={"bn1.weight": "nowhere"}))
    refused(load(made.folder, verify=False).model, WEIGHTS, "nowhere", kind=CorruptBundle)


def test_a_graph_of_another_plan_is_refused(made: Bundle, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "vgg")
    (made.folder / GRAPH).write_bytes((other.folder / GRAPH).read_bytes())
    bundle = load(made.folder, verify=False)
    for call in (bundle.model, bundle.anatomy):
        refused(call, GRAPH, kind=CorruptBundle)


def answers(bundle: Bundle) -> Array:
    return bundle.predict(pictures("resnet18"))


def test_it_serves_from_the_file_that_the_manifest_names(tmp_path: Path) -> None:
    made = make(tmp_path / "slim", exported=True)
    assert made.manifest["file"] == "model.onnx"
    (made.folder / "model.onnx").write_bytes(b"nothing")
    refused(lambda: answers(made), "ONNX Runtime cannot open")
    edit(made.folder, lambda manifest: manifest.update(target="openvino", file="openvino/model.xml"))
    assert answers(load(made.folder, verify=False)).shape == (5, 5)
