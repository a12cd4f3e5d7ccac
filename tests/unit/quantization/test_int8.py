"""Dynamic int8 on a small graph of the kinds of node that our exports hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from paredown.errors import ParedownError
from paredown.quantization import int8

IDS = np.array([[1, 2, 3, 9], [4, 0, 5, 7]])


def small_model(folder: Path) -> Path:
    """Embedding, Gemm, GELU, MatMul; with the value_info that makes the quantizer's shape inference fail."""
    random = np.random.default_rng(0)
    weights = {
        "table": random.normal(size=(10, 16)),
        "up": random.normal(size=(32, 16)) * np.logspace(-2, 0, 32)[:, None],  # outputs of very different sizes
        "up_bias": random.normal(size=32),
        "down": random.normal(size=(32, 3)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="embed"),
        helper.make_node("Reshape", ["x", "flat"], ["rows"], name="flat"),
        helper.make_node("Gemm", ["rows", "up", "up_bias"], ["h"], name="raise", transB=1),
        helper.make_node("Gelu", ["h"], ["g"], name="gelu"),
        helper.make_node("MatMul", ["g", "down"], ["logits"], name="lower"),
    ]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1, 16]), "flat"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 3])],
        tensors,
        value_info=[helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", 77])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def run(path: Path) -> np.ndarray:
    model = onnx.load(path)
    model.graph.ClearField("value_info")  # wrong on purpose, see above
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": IDS})[0]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_linear_maps_and_tables_become_int8_and_the_output_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = small_model(tmp_path)
    out = int8.quantize(source, tmp_path / "int8.onnx", reduce_range=False)
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "model.onnx"]
    operators = [node.op_type for node in onnx.load(out).graph.node]
    assert operators.count("MatMulInteger") == 2
    assert not {"MatMul", "Gemm"} & set(operators)
    weights = weights_of(out)
    assert {"table_quantized", "down_quantized"} <= set(weights)
    assert weights["down_scale"].shape == (3,)  # a scale for each output
    reference = run(source)
    error = np.abs(run(out) - reference).max()
    assert 0 < error < 0.05 * np.abs(reference).max()


def test_reduced_range_uses_seven_bits(tmp_path: Path) -> None:
    source = small_model(tmp_path)
    for reduce, largest in ((False, 127), (True, 64)):
        out = int8.quantize(source, tmp_path / "int8.onnx", reduce_range=reduce)
        assert np.abs(weights_of(out)["down_quantized"].astype(int)).max() == largest


def test_tables_may_stay_in_float(tmp_path: Path) -> None:
    out = int8.quantize(small_model(tmp_path), tmp_path / "int8.onnx", embeddings=False)
    assert weights_of(out)["table"].dtype == np.float32


@pytest.mark.parametrize(
    ("flags", "reduced"),
    [("flags\t\t: fpu avx2", True), ("flags : avx2 avx_vnni", False), ("flags : avx512_vnni", False), ("other", False)],
)
def test_the_cpu_decides_the_range(flags: str, reduced: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert int8.needs_reduced_range(tmp_path / "cpuinfo") is reduced
    assert int8.needs_reduced_range(tmp_path / "missing") is False


def test_what_cannot_be_quantized_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    (tmp_path / "int8.onnx").write_bytes(b"old")
    with pytest.raises(ParedownError, match=r"bad\.onnx cannot be quantized"):
        int8.quantize(tmp_path / "bad.onnx", tmp_path / "int8.onnx")
    with pytest.raises(ParedownError, match="there is no ONNX file"):
        int8.quantize(tmp_path / "missing.onnx", tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.onnx", "int8.onnx"]
