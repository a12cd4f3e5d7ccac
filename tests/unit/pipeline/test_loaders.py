"""What worker processes load by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.files import state_of
from paredown.pipeline._loaders import cut_torch, stock_torch
from paredown.surgery import cut, fold
from paredown.types import Plan
from tests.contracts.families import batch, save, tiny


def test_a_student_on_torch(tmp_path: Path) -> None:
    """Built anew from the dense folder, the plan and the student's own weights."""
    dense = tiny("distilbert", "text-embedding")
    folder = save(dense, tmp_path / "dense")
    model, _ = fold(dense, describe(dense))
    anatomy = describe(model)
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "layer.0.heads": (1,), "layer.1.neurons": (0, 3)})
    small = cut(model, anatomy, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.01)
    save_file(state_of(small), tmp_path / "weights.safetensors")
    inputs = batch(dense)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    encoder, about = Encoder(small, anatomy.layout), {"threads": torch.get_num_threads(), "task": "text-embedding"}
    with torch.no_grad():
        wanted = encoder(**inputs).numpy()
    weights = str(tmp_path / "weights.safetensors")
    found = cut_torch(str(folder), plan=plan.to_json(), weights=weights, **about).run(arrays)["embeddings"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    without = cut_torch(str(folder), plan=plan.to_json(), **about).run(arrays)["embeddings"]
    assert np.abs(without - wanted).max() > 1e-4


def test_the_dense_model_on_torch_takes_the_task_it_is_told(tmp_path: Path) -> None:
    folder = save(tiny("bert", "text-classification"), tmp_path / "dense")
    arrays = {name: value.numpy() for name, value in batch(tiny("bert", "text-classification")).items()}
    threads = torch.get_num_threads()
    assert stock_torch(str(folder), threads=threads).run(arrays)["logits"].shape == (4, 3)
    assert stock_torch(str(folder), threads=threads, task="text-embedding").run(arrays)["embeddings"].shape[0] == 4
