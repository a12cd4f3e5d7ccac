"""Bundles of models that drop tokens while they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from paredown.bundle import Bundle, load, save
from paredown.bundle._format import TOKENS
from paredown.encoder import Encoder
from paredown.errors import CorruptBundle, ParedownError
from paredown.tokens import Packed
from paredown.types import TokenPolicy, TokenStage
from tests.contracts.bundles import TEXTS
from tests.unit.bundle.conftest import edit, refused

POLICY = TokenPolicy("learned", (TokenStage(1, 0.5),), off_below=3, special_ids=(2, 3))


@pytest.fixture
def dropping(parts: dict[str, Any], tmp_path: Path) -> Bundle:
    tensors = {"gate.1": torch.randn(parts["anatomy"].layout.width, generator=torch.Generator().manual_seed(0))}
    return save(tmp_path / "place" / "slim", tokens=POLICY, token_tensors=tensors, **parts)


def test_the_policy_comes_back_and_runs(dropping: Bundle, parts: dict[str, Any], tmp_path: Path) -> None:
    bundle = load(dropping.folder)
    assert bundle.token_policy == POLICY and bundle.manifest["format"] == 2
    network = bundle.network()
    assert isinstance(network, Packed)
    whole = save(tmp_path / "whole", **parts)
    assert whole.token_policy is None and whole.manifest["format"] == 1 and TOKENS not in whole.manifest["files"]
    ours, theirs = bundle.predict(TEXTS), whole.predict(TEXTS)
    lengths = [len(bundle.tokenizer()(text)["input_ids"]) for text in TEXTS]
    changed = np.abs(ours - theirs).max(1) > 1e-5
    assert changed.tolist() == [n > 3 for n in lengths] and len(set(changed)) == 2
    by_hand = Packed(cast(Encoder, whole.network()), POLICY, bundle.token_tensors())
    for text, row in zip(TEXTS, ours, strict=True):
        inputs = bundle.tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            found = by_hand(**{name: inputs[name] for name in by_hand.input_names})
        np.testing.assert_allclose(found[0], row, atol=1e-6)


def test_a_policy_that_learns_nothing_has_no_file(parts: dict[str, Any], tmp_path: Path) -> None:
    bundle = save(tmp_path / "slim", tokens=TokenPolicy("norm", (TokenStage(1, 0.5),)), token_tensors={}, **parts)
    assert TOKENS not in bundle.manifest["files"] and bundle.token_tensors() == {}
    assert bundle.predict(TEXTS).shape == (len(TEXTS), 3)


def test_what_was_learnt_must_be_there_and_whole(dropping: Bundle) -> None:
    path = dropping.folder / TOKENS
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused(lambda: load(dropping.folder), TOKENS, "sha256", kind=CorruptBundle)
    path.write_bytes(original[:20])
    refused(load(dropping.folder, verify=False).network, TOKENS, "cannot be read", kind=CorruptBundle)
    path.unlink()
    refused(lambda: load(dropping.folder), f"lacks {TOKENS}", kind=CorruptBundle)
    edit(dropping.folder, lambda manifest: manifest["files"].pop(TOKENS))
    refused(load(dropping.folder).network, "lacks its tensor gate.1", kind=CorruptBundle)


def test_a_policy_that_makes_no_sense_is_named(dropping: Bundle) -> None:
    edit(dropping.folder, lambda manifest: manifest["tokens"].update(rule="whim"))
    refused(load(dropping.folder).network, "no proper token policy", "whim", kind=CorruptBundle)


def test_a_release_that_knows_no_policies_asks_for_an_upgrade(
    dropping: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paredown.bundle._format.FORMAT", 1)
    refused(lambda: load(dropping.folder), "2")
    assert json.loads((dropping.folder / "bundle.json").read_text())["tokens"]["scorer"] == "learned"


def test_bfloat16_is_near_and_refused_where_the_cpu_lacks_it(dropping: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dropping.predict(TEXTS)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    runner = load(dropping.folder).runner(target="torch", precision="bf16", threads=1)
    tokens = dropping.tokenizer()(list(TEXTS[:1]), return_tensors="np")
    inputs = {name: np.asarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    difference = np.abs(runner.run(inputs)["logits"] - plain[:1]).max()
    assert 1e-7 < difference < 0.05 * np.abs(plain).max() + 0.01
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    with pytest.raises(ParedownError, match="no bfloat16 instructions"):
        dropping.runner(target="torch", precision="bf16")
