"""A bundle whose weights are stored without their zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.bundle import Bundle, load
from paredown.bundle._compressed import WORTH, compressed, expanded
from paredown.errors import CorruptBundle, ParedownError
from paredown.types import TokenPolicy, TokenStage
from tests.contracts.bundles import TEXTS, make, outputs_of
from tests.unit.bundle.conftest import edit, refused

WEIGHTS = "model.safetensors"
MATRIX = "bert.encoder.layer.0.attention.self.query.weight"


def random(shape: tuple[int, ...], zeros: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(shape, generator=generator)
    return found * (torch.rand(shape, generator=generator) >= zeros)


@pytest.fixture
def sparse(tmp_path: Path) -> Bundle:
    return make(tmp_path / "place" / "slim", work=tmp_path / "work", zeros=0.7, target="sparse_cpu")


@pytest.mark.parametrize("shape", [(3, 5), (8, 16), (1, 1), (7, 3, 3, 3)])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9, 1.0])
def test_there_and_back(shape: tuple[int, ...], zeros: float) -> None:
    tensors = {"a.weight": random(shape, zeros), "a.bias": torch.zeros(9), "ids": torch.zeros(4, 4, dtype=torch.int64)}
    stored, shapes = compressed({"a.weight": tensors["a.weight"], "a.bias": tensors["a.bias"]})
    assert ("a.weight" in shapes) == (float((tensors["a.weight"] == 0).float().mean()) >= WORTH)
    found = expanded(stored, shapes)
    assert set(found) == {"a.weight", "a.bias"}
    assert all(torch.equal(found[name], tensors[name]) and found[name].shape == tensors[name].shape for name in found)


@pytest.mark.parametrize("zeros", [0.5, 0.8, 0.95])
def test_it_shrinks_with_the_sparsity(zeros: float) -> None:
    dense = random((256, 512), zeros)
    stored, _ = compressed({"w": dense})
    size = sum(part.nbytes for part in stored.values())
    assert size == pytest.approx(dense.nbytes * (1 / 32 + 1 - zeros), rel=0.02)


def test_a_sparse_bundle_serves_from_every_engine_that_reads_weights(sparse: Bundle) -> None:
    again = load(sparse.folder)
    assert again.manifest["format"] == 3 and MATRIX in again.manifest["compressed"]
    weight = again.model().state_dict()[MATRIX]
    assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    ours, plain = (outputs_of(again, TEXTS, target) for target in ("sparse_cpu", "torch"))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert len(np.unique(plain.round(4))) > 1
    assert again.predict(TEXTS).shape == plain.shape


def test_parts_that_do_not_fit_are_told(sparse: Bundle) -> None:
    path = sparse.folder / WEIGHTS
    whole = load_file(path)

    def broken(**changes: Tensor) -> None:
        save_file({**whole, **{name.replace("__", "."): value for name, value in changes.items()}}, path)
        refused(lambda: load(sparse.folder, verify=False).model(), WEIGHTS, kind=CorruptBundle)

    name = MATRIX.replace(".", "__")
    broken(**{f"{name}__values": whole[f"{MATRIX}.values"][:-1].clone()})
    broken(**{f"{name}__bits": whole[f"{MATRIX}.bits"][:-1].clone()})
    save_file({key: value for key, value in whole.items() if key != f"{MATRIX}.values"}, path)
    refused(lambda: load(sparse.folder, verify=False).model(), WEIGHTS, kind=CorruptBundle)


def test_shapes_made_by_hand_are_checked(sparse: Bundle) -> None:
    for wrong in ([], {"a": []}, {"a": [0]}, {"a": ["x"]}, {"a": 3}):
        edit(sparse.folder, lambda manifest: manifest.update(compressed=wrong))  # noqa: B023
        refused(lambda: load(sparse.folder), "'compressed'", kind=CorruptBundle)


def test_what_the_sparse_engine_does_not_run(tmp_path: Path) -> None:
    policy = TokenPolicy("norm", (TokenStage(1, 0.5),), special_ids=(1, 2))
    bundle = make(tmp_path / "slim", work=tmp_path / "work", tokens=policy)
    with pytest.raises(ParedownError, match="not for sparse_cpu"):
        bundle.runner(target="sparse_cpu")
