"""The ONNX export in all widths, and graphs of other widths made from it for timing."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from paredown.encoder import Encoder
from paredown.errors import ParedownError, UnsupportedModel
from paredown.targets import _lean
from paredown.targets import onnxruntime as target
from paredown.types import Layout

NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention": "attention.self",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
HEAD_DIM = 4
DENSE = (3, 10)  # heads, neurons
SIZES = ((1, 2), (1, 9), (4, 2), (5, 13))


def encoder_of(widths: Sequence[tuple[int, int]], *, pooling: str = "cls", activation: str = "gelu") -> Encoder:
    """A tiny BERT whose layers have these numbers of heads and neurons; every parameter is drawn at random."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=len(widths),
        num_attention_heads=3,
        intermediate_size=10,
        max_position_embeddings=20,
        hidden_act=activation,
        num_labels=3,
    )
    model: Any = BertForSequenceClassification(config) if pooling == "cls" else BertModel(config)
    prefix = "bert." if pooling == "cls" else ""
    layout = Layout(
        layers=f"{prefix}encoder.layer",
        embeddings=(f"{prefix}embeddings",),
        layer_names=NAMES,
        num_heads=3,
        head_dim=HEAD_DIM,
        width=12,
        activation=activation,
        token_types=True,
        pooling=pooling,
        head=("bert.pooler", "classifier") if pooling == "cls" else (),
        normalize=pooling == "mean",
    )
    for block, (heads, neurons) in zip(model.get_submodule(layout.layers), widths, strict=True):
        shapes = {role: (heads * HEAD_DIM, 12) for role in ("query", "key", "value")}
        shapes |= {"output": (12, heads * HEAD_DIM), "up": (neurons, 12), "down": (12, neurons)}
        for role, (rows, columns) in shapes.items():
            parent, _, name = NAMES[role].rpartition(".")
            linear = nn.Linear(1, 1)
            linear.weight, linear.bias = nn.Parameter(torch.empty(rows, columns)), nn.Parameter(torch.empty(rows))
            setattr(block.get_submodule(parent), name, linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # by name, so that embeddings and head never differ
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=random))
    return Encoder(model.eval(), layout).eval()


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces embeddings and head once per pooling: they are the same in every encoder here, and torch takes seconds."""
    trace = target._traced

    def cached(encoder: Encoder, common: _lean.Shared, opset: int) -> tuple[Any, Any]:
        if encoder.layout.pooling not in _TRACED:
            _TRACED[encoder.layout.pooling] = trace(encoder, common, opset)
        return copy.deepcopy(_TRACED[encoder.layout.pooling])

    monkeypatch.setattr(target, "_traced", cached)


_TRACED: dict[str, tuple[Any, Any]] = {}


def inputs_of(batch: int, length: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(batch * 100 + length)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=random)).long()
    ids = torch.randint(0, 40, (batch, length), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape)}


def assert_same(encoder: Encoder, path: Path) -> None:
    runner = target.load(path, threads=1)
    for size in SIZES:
        inputs = inputs_of(*size)
        with torch.inference_mode():
            expected = encoder(**inputs).numpy()
        got = runner.run({name: tensor.numpy() for name, tensor in inputs.items()})[encoder.output_name]
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=str(size))


def operators(path: Path) -> list[tuple[str, list[str]]]:
    """The layers' operators in order, with the names of what they read."""
    return [(node.op_type, list(node.input)) for node in onnx.load(path).graph.node if "layers." in node.output[0]]


WIDTHS = {
    "dense": [DENSE, DENSE],
    "different": [(1, 7), (3, 2), (2, 10)],
    "no heads first": [(0, 10), (2, 4)],
    "no heads last": [(3, 10), (0, 4)],
    "no neurons": [(3, 0), (1, 0)],
    "nothing left": [(0, 0), (0, 0)],
    "one layer": [(2, 5)],
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_every_width_computes_the_same(widths: list[tuple[int, int]], pooling: str, tmp_path: Path) -> None:
    encoder = encoder_of(widths, pooling=pooling)
    assert_same(encoder, target.export(encoder, tmp_path / "model.onnx"))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_every_activation_computes_the_same(activation: str, tmp_path: Path) -> None:
    encoder = encoder_of([DENSE], activation=activation)
    assert_same(encoder, target.export(encoder, tmp_path / "model.onnx"))


@pytest.mark.usefixtures("traced_once")
def test_missing_and_zero_biases_are_not_added(tmp_path: Path) -> None:
    encoder = encoder_of([DENSE, DENSE])
    for layer in encoder.layers:
        layer.query.bias = layer.value.bias = None
        with torch.no_grad():
            layer.output.bias.zero_()
            layer.up.bias.zero_()
    path = target.export(encoder, tmp_path / "model.onnx")
    read = {name for _, names in operators(path) for name in names}
    assert not read & {f"layers.{i}.{part}_bias" for i in (0, 1) for part in ("qkv", "query", "out", "up")}
    assert "layers.0.down_bias" in read
    assert_same(encoder, path)


def test_the_file_is_one_clean_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = encoder_of([DENSE, DENSE])
    target.export(encoder, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    model = onnx.load(tmp_path / "model.onnx")
    assert [entry.name for entry in model.graph.input] == list(encoder.input_names)
    assert [entry.name for entry in model.graph.output] == ["logits"]
    assert not model.graph.value_info
    assert {entry.domain for entry in model.opset_import} == {""}
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()  # no stack traces of the exporting machine
    for entry in model.graph.input:
        assert [bool(d.dim_param) for d in entry.type.tensor_type.shape.dim] == [True, True]


def test_export_leaves_model_and_random_state_alone(tmp_path: Path) -> None:
    encoder = encoder_of([DENSE])
    encoder.model.train()
    training = [part.training for part in encoder.modules()]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random = torch.random.get_rng_state()
    path = target.export(encoder, tmp_path / "model.onnx")
    assert [part.training for part in encoder.modules()] == training
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert_same(encoder.eval(), path)  # the dropout that was switched on is not in the file


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(model: Any, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space"):
        target.export(encoder_of([DENSE]), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ParedownError, match="opset 17 has no Gelu"):
        target.export(encoder_of([DENSE]), tmp_path / "model.onnx", opset=17)
    with pytest.raises(UnsupportedModel, match=r"float32 models.*float64"):
        target.export(encoder_of([DENSE]).double(), tmp_path / "model.onnx")
    encoder = encoder_of([DENSE, DENSE])
    encoder.layers[0].ffn_norm.eps = 0.5
    with pytest.raises(UnsupportedModel, match="2 different epsilons"):
        target.export(encoder, tmp_path / "model.onnx")


def test_a_file_that_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(ParedownError, match=f"cannot open .*{name}"):
            target.load(tmp_path / name, threads=1)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_probe_has_the_operators_and_shapes_of_a_real_export(pooling: str, tmp_path: Path) -> None:
    dense = target.export(encoder_of([DENSE] * 3, pooling=pooling), tmp_path / "dense.onnx")
    for number, widths in enumerate([[DENSE] * 3, [(2, 4), (0, 10), (1, 0)], [(1, 3), (3, 13)], [(0, 0)]]):
        real = target.export(encoder_of(widths, pooling=pooling), tmp_path / f"{number}.onnx")
        made = target.probe(dense, tmp_path / f"probe{number}.onnx", widths)
        assert operators(made) == operators(real)
        shapes = [{t.name: list(t.dims) for t in onnx.load(path).graph.initializer} for path in (made, real)]
        assert shapes[0] == shapes[1]
        inputs = {name: tensor.numpy() for name, tensor in inputs_of(3, 7).items()}
        outputs = target.load(made, threads=1).run(inputs)
        assert [array.shape for array in outputs.values()] == [(3, 3 if pooling == "cls" else 12)]


@pytest.mark.usefixtures("traced_once")
def test_a_probe_of_the_dense_widths_is_the_dense_model(tmp_path: Path) -> None:
    encoder = encoder_of([DENSE] * 2)
    dense = target.export(encoder, tmp_path / "dense.onnx")
    assert_same(encoder, target.probe(dense, tmp_path / "probe.onnx", [DENSE] * 2))


@pytest.mark.usefixtures("traced_once")
def test_a_probe_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    cut = target.export(encoder_of([DENSE, (0, 3)]), tmp_path / "cut.onnx")
    with pytest.raises(ParedownError, match="gone already"):
        target.probe(cut, tmp_path / "probe.onnx", [DENSE])
    dense = target.export(encoder_of([DENSE]), tmp_path / "dense.onnx")
    with pytest.raises(ParedownError, match="one layer at least"):
        target.probe(dense, tmp_path / "probe.onnx", [])
    with pytest.raises(ParedownError, match="one layer only"):
        target.probe(dense, tmp_path / "probe.onnx", [DENSE, DENSE])
    model = onnx.load(dense)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ParedownError, match="not written by paredown"):
        target.probe(tmp_path / "foreign.onnx", tmp_path / "probe.onnx", [DENSE])


def test_shared_facts_survive_the_file() -> None:
    common = _lean.shared(encoder_of([DENSE]))
    assert _lean.Shared.from_json(common.to_json()) == common
