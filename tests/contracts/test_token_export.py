"""What the export of a token-pruned model must pass: on every runtime the graph computes what torch computes packed,
for every encoder family, scorer and rule, texts of any length and batches of any size.

Stem, head and scorer are traced once per model: the stages are written anew for every policy.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from paredown.encoder import Encoder
from paredown.errors import UnsupportedModel
from paredown.quantization import int8
from paredown.targets import _tokens, onnxruntime, openvino
from paredown.tokens import Packed
from paredown.types import Runner, TokenPolicy, TokenStage
from tests.contracts.families import FAMILIES
from tests.contracts.policies import ENCODERS, RULES, SCORERS, SPECIAL, example, median_score, ragged, trained

TOLERANCE = 1e-4  # the project's promise for fp32
BATCHES = ((11, 9, 9, 7, 7, 7, 3, 2, 1), (38,), (1,), (1, 1), (7, 7, 5), (30, 2, 17, 38, 1, 5))
LEVEL = 0.0  # of a threshold: its place is taken by the scorer's median on the model

POLICIES: dict[str, dict[str, Any]] = {
    **RULES,
    "threshold": {"rule": "threshold", "stages": (TokenStage(1, LEVEL),)},
    "two thresholds": {"rule": "threshold", "stages": (TokenStage(1, LEVEL), TokenStage(3, LEVEL)), "least": 3},
    "two switched off": {"rule": "quantile", "stages": (TokenStage(2, 0.5), TokenStage(3, 0.5)), "off_below": 9},
    "threshold switched off": {"rule": "threshold", "stages": (TokenStage(2, LEVEL),), "off_below": 7},
    "nothing special": {"rule": "ratio", "stages": (TokenStage(1, 0.4), TokenStage(3, 0.9)), "special_ids": ()},
}
NAMES = list(POLICIES)
# Every scorer meets every policy in some family, and every family every policy under some scorer.
SAMPLE = [
    (*case, scorer, NAMES[(5 * i + j) % len(NAMES)], bool((i // 2 + j) % 2))
    for i, case in enumerate(ENCODERS)
    for j, scorer in enumerate(SCORERS)
]
# OpenVINO takes two seconds to read and compile a graph. With this stride ten of them leave no name out.
FEWER = [SAMPLE[23 * i % len(SAMPLE)] for i in range(10)]


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """An export here reads the trace of an earlier one where model and scorer are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "_traced", _kept(onnxruntime._traced, lambda encoder, *_: encoder))
        patch.setattr(_tokens, "_traced", _kept(_tokens._traced, lambda scoring, *sizes: (scoring._score, *sizes)))
        yield


def _kept(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[Any, Any] = {}

    def call(*arguments: Any, **options: Any) -> Any:
        which = key(*arguments), *options.items()
        if which not in found:
            found[which] = function(*arguments, **options)
        return copy.deepcopy(found[which])

    return call


_MODELS: dict[tuple[str, str, str], Encoder] = {}


def model_of(family: str, task: str, pooling: str = "") -> Encoder:
    if (family, task, pooling) not in _MODELS:
        _MODELS[family, task, pooling] = example(family, task, pooling=pooling)[0].eval()
    return _MODELS[family, task, pooling]


def pruned(encoder: Encoder, scorer: str, name: str, *, exit: bool) -> Packed:
    fields = {"special_ids": SPECIAL, **POLICIES[name]}
    if fields["rule"] == "threshold":
        level = median_score(encoder, scorer, ragged(encoder.model, BATCHES[-1]))
        fields["stages"] = tuple(TokenStage(stage.after, level) for stage in fields["stages"])
    policy = TokenPolicy(scorer, exit=exit and encoder.layout.pooling == "mean", **fields)
    return Packed(encoder, policy, trained(encoder, policy))


def texts(packed: Packed) -> Iterator[dict[str, Tensor]]:
    """Batches of several sizes and lengths, the last one wider than its longest text."""
    inputs = {}
    for seed, lengths in enumerate(BATCHES):
        inputs = ragged(packed.model, lengths, seed=seed)
        yield inputs
    wide = {name: torch.nn.functional.pad(tensor[:3, :30], (0, 8)) for name, tensor in inputs.items()}
    wide["input_ids"][wide["attention_mask"] == 0] = packed.model.config.pad_token_id  # type: ignore[union-attr]
    yield wide


def agrees(runner: Runner, packed: Packed, tolerance: float = TOLERANCE) -> None:
    for inputs in texts(packed):
        found = runner.run({name: tensor.numpy() for name, tensor in inputs.items()})
        assert list(found) == [packed.output_name]
        with torch.no_grad():
            wanted = packed(**inputs).numpy()
        shape = tuple(inputs["input_ids"].shape)
        np.testing.assert_allclose(found[packed.output_name], wanted, atol=tolerance, rtol=1e-4, err_msg=str(shape))


def policy_of(path: Path) -> TokenPolicy:
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return TokenPolicy.from_json(about[_tokens.METADATA])


def test_the_samples_leave_nothing_out() -> None:
    for sample in (SAMPLE, FEWER):
        assert {one[0] for one in sample} == {family for family, _ in ENCODERS}
        assert {one[2] for one in sample} == set(SCORERS)
        assert {one[3] for one in sample} == set(POLICIES)
        assert {exit for _, task, *_, exit in sample if task == "text-embedding"} == {False, True}
    assert len({(scorer, name) for _, _, scorer, name, _ in SAMPLE}) == len(SCORERS) * len(POLICIES)
    assert len({(family, name) for family, _, _, name, _ in SAMPLE}) == len(FAMILIES) * len(POLICIES)


@pytest.mark.parametrize(("family", "task", "scorer", "name", "exit"), SAMPLE)
def test_onnxruntime_computes_what_torch_computes(
    family: str, task: str, scorer: str, name: str, exit: bool, tmp_path: Path
) -> None:
    packed = pruned(model_of(family, task), scorer, name, exit=exit)
    path = onnxruntime.export(packed, tmp_path / "model.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert policy_of(path) == packed.policy
    assert b"site-packages" not in path.read_bytes(), "it names files of the machine that exported"
    runner = onnxruntime.load(path, threads=1)
    agrees(runner, packed)
    runner.close()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_with_and_without_an_exit_and_for_either_pooling(name: str, pooling: str, tmp_path: Path) -> None:
    for exit in {False, pooling == "mean"}:
        packed = pruned(model_of("bert", "text-embedding", pooling), "norm", name, exit=exit)
        agrees(onnxruntime.load(onnxruntime.export(packed, tmp_path / "model.onnx"), threads=1), packed)


@pytest.mark.parametrize(("family", "task", "scorer", "name", "exit"), FEWER)
def test_openvino_computes_what_torch_computes(
    family: str, task: str, scorer: str, name: str, exit: bool, tmp_path: Path
) -> None:
    packed = pruned(model_of(family, task), scorer, name, exit=exit)
    path = openvino.export(onnxruntime.export(packed, tmp_path / "model.onnx"), tmp_path / "model.xml")
    runner = openvino.load(path, threads=1)
    agrees(runner, packed)
    runner.close()


def test_a_large_vocabulary_and_long_texts(tmp_path: Path) -> None:
    """Numbers that the tiny models do not reach: the random scorer multiplies ids, tables go as far as positions."""
    encoder, _ = example("bert", "text-embedding", vocab_size=119_547, max_position_embeddings=512)
    policy = TokenPolicy("random", (TokenStage(1, 0.3), TokenStage(2, 0.7)), special_ids=SPECIAL)
    packed = Packed(encoder.eval(), policy)
    inputs = ragged(encoder.model, (512, 300, 4))
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(ids >= 5, 119_546 - 1_973 * (ids - 5), ids)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        wanted = packed(**inputs).numpy()
    path = onnxruntime.export(packed, tmp_path / "model.onnx")
    for runner in (onnxruntime.load(path, threads=1), openvino.load(path, threads=1)):
        np.testing.assert_allclose(runner.run(feed)[packed.output_name], wanted, atol=TOLERANCE)
        runner.close()


def test_a_policy_that_drops_nothing_is_the_dense_export(tmp_path: Path) -> None:
    encoder = model_of("bert", "text-embedding")
    policy = TokenPolicy("norm", (TokenStage(1, 1.0),))
    dense = onnxruntime.export(encoder, tmp_path / "dense.onnx")
    same = onnxruntime.export(Packed(encoder, policy), tmp_path / "same.onnx")
    assert dense.read_bytes() == same.read_bytes()


def test_merging_is_refused_in_a_sentence(tmp_path: Path) -> None:
    policy = TokenPolicy("norm", (TokenStage(1, 0.5),), action="merge")
    with pytest.raises(UnsupportedModel, match=r"merging tokens cannot be exported.*let the policy drop them"):
        onnxruntime.export(Packed(model_of("bert", "text-embedding"), policy), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "task", "name"),
    [("bert", "text-classification", "two ratios"), ("mpnet", "text-embedding", "two switched off")],
)
def test_in_int8_the_same_tokens_go(family: str, task: str, name: str, tmp_path: Path) -> None:
    """By position, so that rounding decides nothing: what differs then is the rounding of the linear maps."""
    encoder = model_of(family, task)
    dense = onnxruntime.export(encoder, tmp_path / "dense.onnx")
    packed = pruned(encoder, "last", name, exit=True)
    files = {"dense": dense, "tokens": onnxruntime.export(packed, tmp_path / "tokens.onnx")}
    errors: dict[str, list[float]] = {"dense": [], "tokens": []}
    for which, path in files.items():
        exact = onnxruntime.load(path, threads=1)
        rough = onnxruntime.load(int8.quantize(path, tmp_path / f"{which}-int8.onnx"), threads=1)
        for inputs in texts(packed):
            feed = {key: tensor.numpy() for key, tensor in inputs.items()}
            difference = rough.run(feed)[packed.output_name] - exact.run(feed)[packed.output_name]
            errors[which].append(float(np.abs(difference).mean()))
    assert 0 < np.mean(errors["tokens"]) < 2 * np.mean(errors["dense"]), errors
    assert policy_of(tmp_path / "tokens-int8.onnx") == packed.policy


ALONE = """
import sys, numpy, onnxruntime
ids = numpy.arange(5, 27).reshape(2, 11)
inputs = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
assert all(isinstance(size, str) for entry in session.get_inputs() for size in entry.shape)
out = session.run(None, inputs)[0]
assert "paredown" not in sys.modules and "torch" not in sys.modules and "onnx" not in sys.modules
numpy.save(sys.argv[2], out)
"""


def test_the_file_runs_with_onnxruntime_alone(tmp_path: Path) -> None:
    packed = pruned(model_of("bert", "text-embedding"), "norm", "two ratios", exit=True)
    path = onnxruntime.export(packed, tmp_path / "model.onnx")
    command = [sys.executable, "-c", ALONE, str(path), str(tmp_path / "out.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(5, 27).reshape(2, 11)
    with torch.no_grad():
        wanted = packed(ids, torch.ones_like(ids), torch.zeros_like(ids)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, atol=TOLERANCE)
