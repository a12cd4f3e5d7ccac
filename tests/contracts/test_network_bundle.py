"""What every bundle of a traced network must pass: it reopens anywhere, notices a changed byte, holds no pickle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from paredown.bundle import MANIFEST, Bundle, load
from paredown.errors import CorruptBundle, ParedownError
from paredown.graph import fingerprint
from paredown.tasks.image_classification import normalized
from paredown.types import GraphAnatomy
from tests.contracts.network_bundles import MEAN, STD, answers_of, make, parts, pictures
from tests.contracts.networks import NETWORKS
from tests.contracts.test_bundle import GOLDEN, ROOT, has, run_fresh

TARGETS = ("torch", "onnxruntime", "openvino")
SERVED = ("resnet18", "mobilenetv2", "se-resnet")

FRESH = """
import json, sys
import numpy as np
import paredown
bundle = paredown.load(sys.argv[1])
pixels = np.array(json.loads(sys.argv[2]), np.uint8)
outputs = [bundle.predict(pixels).tolist()]
from paredown.bundle import torch_runner
from paredown.tasks.image_classification import normalized
x = normalized(pixels, bundle.manifest["mean"], bundle.manifest["std"])
outputs.append(torch_runner(sys.argv[1], threads=1).run({"pixel_values": x})["logits"].tolist())
print(json.dumps(outputs))
"""

ALONE = """
import json, sys
for name in ("paredown", "torch", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy, onnxruntime
manifest = json.load(open(sys.argv[1] + "/bundle.json"))
x = numpy.array(json.loads(sys.argv[2]), numpy.float32) / 255
x = (x - numpy.float32(manifest["mean"])) / numpy.float32(manifest["std"])
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
print(json.dumps(session.run(["logits"], {"pixel_values": x.transpose(0, 3, 1, 2)})[0].tolist()))
"""


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    """A network's name, and a bundle of it with a file for every target."""
    name = str(request.param)
    return name, make(tmp_path_factory.mktemp(name) / "bundle", name, exported=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    expected: fx.GraphModule = parts(name)["model"]
    labels = () if name == "unet" else ("a", "b", "c", "d", "e")
    saved = make(tmp_path / "bundle", name, labels=labels)
    bundle = load(tmp_path / "bundle")
    assert bundle == saved and bundle.is_network and bundle.manifest["format"] == 4
    model = bundle.model()
    assert isinstance(model, fx.GraphModule) and not model.training
    assert fingerprint(model) == fingerprint(expected)
    assert not [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in expected.named_parameters()]
    x = torch.from_numpy(normalized(pictures(name), MEAN, STD))
    with torch.no_grad():
        out = expected(x.clone()).numpy()
    np.testing.assert_array_equal(model(x).detach(), out)
    np.testing.assert_allclose(bundle.predict(pictures(name), batch_size=2), out, atol=1e-6 + 1e-4 * np.abs(out).max())
    assert bundle.anatomy().fingerprint == bundle.plan.fingerprint
    assert bundle.report()["speedup"]["value"] == 2.0


def test_a_fresh_process_computes_the_same(served: tuple[str, Bundle]) -> None:
    name, bundle = served
    pixels = pictures(name)
    ours, eager = run_fresh(FRESH, str(bundle.folder), json.dumps(pixels.tolist()), cwd=ROOT)
    np.testing.assert_allclose(ours, bundle.predict(pixels), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eager, answers_of(bundle, pixels, "torch"), rtol=1e-5, atol=1e-6)


def test_every_file_that_serves_computes_the_same(served: tuple[str, Bundle]) -> None:
    name, bundle = served
    expected = answers_of(bundle, pictures(name), "torch")
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # pictures do matter
    for target in TARGETS:
        found = answers_of(bundle, pictures(name), target)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=target)


def test_the_onnx_file_runs_alone(served: tuple[str, Bundle], tmp_path: Path) -> None:
    name, bundle = served
    found = run_fresh(ALONE, str(bundle.folder), json.dumps(pictures(name).tolist()), cwd=tmp_path)
    expected = bundle.predict(pictures(name))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_flipped_byte_in_any_file_is_noticed(served: tuple[str, Bundle]) -> None:
    folder = served[1].folder
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {MANIFEST, "graph.json", "plan.json", "model.safetensors", "model.onnx", "model.bin", "report.json"}
    assert {path.name for path in paths} >= names
    for path in paths:
        original = path.read_bytes()
        for at in (0, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
            with pytest.raises(CorruptBundle, match=path.name):
                load(folder)
        path.write_bytes(original[:-1])
        with pytest.raises(CorruptBundle, match=path.name):
            load(folder)
        path.unlink()
        with pytest.raises(ParedownError, match=path.name):
            load(folder)
        path.write_bytes(original)
    load(folder)


def test_nothing_is_a_pickle(served: tuple[str, Bundle]) -> None:
    folder = served[1].folder
    for path in folder.rglob("*"):
        if path.is_dir() or path == folder / "openvino" / "model.bin":  # raw weights, by OpenVINO's own name
            continue
        start = path.read_bytes()[:4]
        assert path.suffix in (".json", ".safetensors", ".onnx", ".xml", ".html"), path
        assert start[:1] != b"\x80", f"{path} starts as a pickle does"
        assert start != b"PK\x03\x04", f"{path} is an archive, as torch.save writes it"


@pytest.mark.parametrize("kind", ["weight", "running_var"])
def test_tied_tensors_stay_tied(kind: str, tmp_path: Path) -> None:
    arguments = parts("resnet18")
    first, second = (arguments["model"].get_submodule(f"layers.{i}.bn1") for i in range(2))
    assert getattr(first, kind).shape == getattr(second, kind).shape
    setattr(first, kind, getattr(second, kind))

    bundle = make(tmp_path / "bundle", change=lambda given: given.update(model=arguments["model"]))
    assert bundle.manifest["tied"] == {f"layers.1.bn1.{kind}": f"layers.0.bn1.{kind}"}
    again: nn.Module = load(bundle.folder).model()
    first, second = (again.get_submodule(f"layers.{i}.bn1") for i in range(2))
    assert getattr(first, kind) is getattr(second, kind)
    x = torch.from_numpy(normalized(pictures("resnet18"), MEAN, STD))
    assert torch.equal(again(x.clone()), arguments["model"](x.clone()))


def test_a_module_used_twice_is_there_once(tmp_path: Path) -> None:
    model = make(tmp_path / "bundle", "twice").model()
    assert sum("shared.weight" in name for name in model.state_dict()) == 1


@pytest.mark.parametrize("golden", [path for path in GOLDEN if has(path, "pictures")], ids=lambda path: path.name)
def test_a_golden_bundle_still_loads(golden: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    bundle = load(golden / "bundle")
    assert bundle.plan.id == expected["plan_id"]
    rows = np.array([list(bytes.fromhex(picture)) for picture in expected["pictures"]], np.uint8)
    pixels = rows.reshape(-1, *bundle.manifest["size"], 3)
    served = bundle.predict(pixels)
    np.testing.assert_allclose(served, expected["outputs"]["onnxruntime"], rtol=1e-4, atol=1e-5)
    for target, outputs in expected["outputs"].items():
        found = answers_of(bundle, pixels, target)
        np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-5, err_msg=target)
    assert bundle.labels_of(served) == expected["labels"] and len(set(expected["labels"])) > 1
    anatomy = bundle.anatomy()
    assert isinstance(anatomy, GraphAnatomy) and 0 < len(anatomy.gone(bundle.plan)) < len(anatomy.branches)
