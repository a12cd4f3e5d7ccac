"""A bundle whose model drops tokens while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.bundle import MANIFEST, Bundle, load, save
from paredown.encoder import Encoder
from paredown.errors import CorruptBundle, ParedownError
from paredown.tokens import Packed, fit
from paredown.types import TokenPolicy, TokenStage
from tests.contracts import families
from tests.contracts.bundles import TEXTS
from tests.unit.bundle.conftest import content, edit, refused

FILE = "tokens.safetensors"
GATED = TokenPolicy("learned", (TokenStage(1, 0.5),), special_ids=(1, 2))
PLAIN = TokenPolicy("norm", (TokenStage(1, 0.5),), special_ids=(1, 2))


def inputs_of(model: Any) -> dict[str, Tensor]:
    return families.batch(model, lengths=(11, 9, 7, 6, 2))


@pytest.fixture
def learnt(parts: dict[str, Any]) -> dict[str, Tensor]:
    """The gate of the cut model, fitted to a batch."""
    encoder = Encoder(parts["model"], parts["anatomy"].layout)
    return fit(encoder, GATED, [{name: value.numpy() for name, value in inputs_of(parts["model"]).items()}])


@pytest.fixture
def gated(parts: dict[str, Any], learnt: dict[str, Tensor], tmp_path: Path) -> Bundle:
    return save(tmp_path / "slim", **parts, tokens=GATED, token_tensors=learnt)


def answers(bundle: Bundle, precision: str) -> Any:
    inputs = {name: value.numpy() for name, value in inputs_of(bundle.model()).items()}
    runner = bundle.runner(target="torch", precision=precision, threads=torch.get_num_threads())
    try:
        return runner.run(inputs)["logits"]
    finally:
        runner.close()


def cpu(monkeypatch: pytest.MonkeyPatch, found: Mapping[str, object]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(found))


def test_it_comes_back_with_its_policy_and_answers_alike(
    gated: Bundle, parts: dict[str, Any], learnt: dict[str, Tensor]
) -> None:
    bundle = load(gated.folder)
    assert bundle == gated and bundle.token_policy == GATED and bundle.token_policy.id == GATED.id
    assert bundle.manifest["tokens"] == json.loads(GATED.to_json())
    found = bundle.token_tensors()
    assert found.keys() == learnt.keys() == {"gate.1"} and torch.equal(found["gate.1"], learnt["gate.1"])
    network, inputs = bundle.network(), inputs_of(parts["model"])
    assert isinstance(network, Packed) and network.policy == GATED
    dense = Encoder(parts["model"], parts["anatomy"].layout)
    with torch.no_grad():
        out = network(**inputs)
        assert torch.equal(out, Packed(dense, GATED, learnt)(**inputs))
        assert not torch.allclose(out, dense(**inputs), atol=1e-3)  # tokens did go
    np.testing.assert_allclose(answers(bundle, "fp32"), out, atol=1e-6)
    assert bundle.predict(TEXTS).shape == (5, 3)


def test_the_format_is_the_one_that_earlier_releases_read_unless_tokens_go(
    gated: Bundle, parts: dict[str, Any], tmp_path: Path
) -> None:
    whole = save(tmp_path / "whole", **parts)
    assert (gated.manifest["format"], whole.manifest["format"], "compressed" in whole.manifest) == (2, 1, False)
    assert "tokens" not in whole.manifest and FILE not in whole.manifest["files"]
    assert load(whole.folder).token_policy is None and whole.token_tensors() == {}
    assert isinstance(whole.network(), Encoder)


def test_a_policy_that_learnt_nothing_has_no_file(parts: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "slim", **parts, tokens=PLAIN, token_tensors={})
    bundle = load(tmp_path / "slim")
    assert bundle.manifest["format"] == 2 and not (bundle.folder / FILE).exists()
    network = bundle.network()
    assert isinstance(network, Packed) and network.policy == PLAIN


def test_a_policy_that_can_drop_nothing_costs_nothing(parts: dict[str, Any], tmp_path: Path) -> None:
    policy = TokenPolicy("norm", (TokenStage(1, 1.0),))
    bundle = save(tmp_path / "slim", **parts, tokens=policy)
    assert bundle.token_policy == policy and isinstance(bundle.network(), Encoder)


def test_a_missing_or_changed_file_is_noticed(gated: Bundle) -> None:
    path = gated.folder / FILE
    original = path.read_bytes()
    for at in (0, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        refused(lambda: load(gated.folder), FILE, "sha256 differs", kind=CorruptBundle)
    path.unlink()
    for verify in (True, False):
        refused(lambda: load(gated.folder, verify=verify), f"lacks {FILE}", kind=CorruptBundle)  # noqa: B023
    refused(gated.network, FILE, kind=CorruptBundle)  # opened before it went
    path.write_bytes(original)
    load(gated.folder).network()


@pytest.mark.parametrize("text", [b"", b"nothing", b"\xff" * 64])
def test_a_broken_file_is_one_sentence(text: bytes, gated: Bundle) -> None:
    (gated.folder / FILE).write_bytes(text)
    bundle = load(gated.folder, verify=False)
    for call in (bundle.token_tensors, bundle.network, lambda: bundle.runner(target="torch")):
        refused(call, FILE, "does not hold what the token policy has learnt", kind=CorruptBundle)


def test_tensors_of_another_policy_are_refused(gated: Bundle, learnt: dict[str, Tensor]) -> None:
    before = content(gated.folder)
    for tensors in ({"gate.1": learnt["gate.1"][:5].contiguous()}, {"gate.2": learnt["gate.1"]}):
        save_file(tensors, gated.folder / FILE)
        refused(load(gated.folder, verify=False).network, "gate.1", str(gated.folder), kind=CorruptBundle)
    (gated.folder / FILE).unlink()
    edit(gated.folder, lambda manifest: manifest["files"].pop(FILE))  # not even listed
    refused(load(gated.folder).network, "gate.1", kind=CorruptBundle)
    (gated.folder / FILE).write_bytes(before[FILE])
    assert load_file(gated.folder / FILE).keys() == {"gate.1"}


@pytest.mark.parametrize(
    "change",
    [{"rule": "best"}, {"version": 2}, {"stages": [{"after": 0, "keep": 0.5}]}, {"colour": "red"}, {"stages": [1]}]
    + [{"stages": None}, {"stages": [{"after": 9, "keep": 0.5}]}],
)
def test_a_policy_that_makes_no_sense_is_refused(change: dict[str, Any], gated: Bundle) -> None:
    edit(gated.folder, lambda manifest: manifest["tokens"].update(change))
    refused(load(gated.folder).network, str(gated.folder), "policy", kind=CorruptBundle)
    edit(gated.folder, lambda manifest: manifest.update(tokens={**json.loads(GATED.to_json()), "scorer": "nobody"}))
    refused(load(gated.folder).network, "'nobody'", "learned")
    for value in ([], "norm", 3):
        edit(gated.folder, lambda manifest: manifest.update(tokens=value))  # noqa: B023
        refused(lambda: load(gated.folder), MANIFEST, "'tokens'", kind=CorruptBundle)


def test_no_other_file_may_take_the_name(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    refused(lambda: save(tmp_path / "slim", **parts, files={FILE: tmp_path / "x"}), FILE)


@pytest.mark.parametrize("dropping", [True, False])
def test_bfloat16_agrees(
    dropping: bool, gated: Bundle, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(monkeypatch, {"avx512_bf16": True, "amx_bf16": False})  # any other computes the same, slowly
    # By position rather than by a score: two scores that are nearly equal may change places in bfloat16.
    last = TokenPolicy("last", (TokenStage(1, 0.5),), special_ids=(1, 2))
    bundle = save(tmp_path / "other", **parts, tokens=last if dropping else None)
    exact, rough = answers(bundle, "fp32"), answers(bundle, "bf16")
    assert rough.dtype == np.float32
    difference = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.05  # it has 8 bits of precision: 0 would be float32
    assert answers(gated, "bf16").shape == exact.shape


def test_a_cpu_without_bfloat16_says_so(gated: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "an old one"})
    refused(lambda: answers(gated, "bf16"), "no bfloat16 instructions")
    cpu(monkeypatch, {})
    refused(lambda: answers(gated, "bf16"), "no bfloat16 instructions", kind=ParedownError)
    assert answers(gated, "fp32").shape == (5, 3)
    refused(lambda: answers(gated, "fp16"), "no fp16 file for torch", "torch fp32, torch bf16")
