"""What only these two targets can get wrong; parity is in the contract tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from paredown.errors import ParedownError
from paredown.targets import openvino


def doubler(folder: Path) -> Path:
    """An ONNX file: logits = 2 * input_ids as float."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "x"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, kind, ["batch", "length"])
        for name, kind in (("input_ids", TensorProto.INT64), ("logits", TensorProto.FLOAT))
    ]
    graph = helper.make_graph(nodes, "doubler", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_model_is_a_pair_of_files_and_runs_from_either_format(tmp_path: Path) -> None:
    source = doubler(tmp_path)
    out = tmp_path / "ov"
    out.mkdir()
    written = openvino.export(source, out / "model.xml")
    assert sorted(path.name for path in out.iterdir()) == ["model.bin", "model.xml"]
    ids = np.arange(6).reshape(2, 3)
    for path in (written, source):
        runner = openvino.load(path, threads=1)
        np.testing.assert_array_equal(runner.run({"input_ids": ids, "token_type_ids": ids})["logits"], 2.0 * ids)
        runner.close()


def test_bad_files_and_names_are_said(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ParedownError, match=r"cannot open .*bad\.onnx"):
        openvino.export(tmp_path / "bad.onnx", tmp_path / "model.xml")
    with pytest.raises(ParedownError, match=r"cannot open .*missing\.xml"):
        openvino.load(tmp_path / "missing.xml", threads=1)
    with pytest.raises(ParedownError, match=r"must end in \.xml"):
        openvino.export(doubler(tmp_path), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.onnx", "model.onnx"]
