"""The sparse engine runs whole encoders: any batch, any share of zeros, head sizes and widths that are not round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import ParedownError, UnsupportedModel
from paredown.kernels import encoder as kernels
from paredown.kernels.encoder import BLOCKS, DENSE, SPARSE
from paredown.targets import sparse_cpu
from tests.contracts.families import VOCABULARY, tiny


def encoder_of(family: str, task: str, zeros: float, **config: Any) -> Encoder:
    model = tiny(family, task, max_position_embeddings=300, **config)
    encoder = Encoder(model, describe(model).layout).eval()
    with torch.no_grad():
        for layer in encoder.layers:
            for part in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down):
                part.weight[torch.rand_like(part.weight) < zeros] = 0
    return encoder


def batch(lengths: tuple[int, ...]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(5, VOCABULARY, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def gap(encoder: Encoder, lengths: tuple[int, ...], threads: int = 2, **options: Any) -> float:
    runner, inputs = sparse_cpu.load_encoder(encoder, threads=threads, **options), batch(lengths)
    with torch.inference_mode():
        want = encoder(*(torch.from_numpy(inputs[name]) for name in encoder.input_names)).numpy()
    got = [runner.run(inputs)[encoder.output_name] for _ in range(2)]
    runner.close()
    assert np.array_equal(*got)  # memory that is used again holds nothing of the batch before
    return float(np.abs(got[0] - want).max() / np.abs(want).max())


@pytest.mark.parametrize("lengths", [(1,), (16,), (3, 64, 65, 1), (200, 7), (12,) * 64])
@pytest.mark.parametrize("task", ["text-classification", "text-embedding"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])  # without and with a position bias
def test_any_batch_is_computed_as_torch_does(family: str, task: str, lengths: tuple[int, ...]) -> None:
    assert gap(encoder_of(family, task, 0.7), lengths) < 1e-5


@pytest.mark.parametrize("kind", [SPARSE, BLOCKS, DENSE])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
def test_any_storage_on_any_number_of_threads(kind: int, threads: int, zeros: float) -> None:
    encoder = encoder_of("bert", "text-classification", zeros)
    assert gap(encoder, (70, 9, 33), threads, choose=lambda _: kind) < 1e-5


def test_few_tokens_take_as_many_threads_as_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, taken = encoder_of("bert", "text-classification", 0.9), []
    monkeypatch.setattr(
        kernels, "use_threads", lambda threads, own=kernels.use_threads: (taken.append(threads), own(threads))
    )
    runner = sparse_cpu.load_encoder(encoder, threads=2, choose=lambda _: SPARSE)
    few = [runner.run(batch((9,)))["logits"] for _ in range(2 * sparse_cpu.TRIALS + 3)]
    assert all(np.array_equal(few[0], one) for one in few)
    assert sorted(taken[: 2 * sparse_cpu.TRIALS]) == [1] * sparse_cpu.TRIALS + [2] * sparse_cpu.TRIALS
    assert len(set(taken[2 * sparse_cpu.TRIALS :])) == 1
    taken.clear()
    runner.run(batch((200, 9)))
    assert taken == [2]
    runner.close()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_every_activation(activation: str) -> None:
    assert gap(encoder_of("bert", "text-embedding", 0.5, hidden_act=activation), (20, 5)) < 1e-5


@pytest.mark.parametrize(("took", "chosen"), [((1, 2, 3), DENSE), ((2, 1, 3), SPARSE), ((3, 2, 1), BLOCKS)])
def test_the_form_that_takes_least_time_is_chosen(
    took: tuple[int, ...], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that the products move: which form a CPU is fastest with is its own affair."""
    now = [0.0]
    monkeypatch.setattr(sparse_cpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(kernels, "product", lambda x, y, w, number, t: now.__setitem__(0, now[0] + took[number]))
    weight = np.eye(64, dtype=np.float32)
    assert sparse_cpu.fastest(weight) == chosen


def test_what_has_no_zeros_is_dense_untimed() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 96), dtype=np.float32)
    assert sparse_cpu.fastest(weight) == DENSE


def test_what_it_cannot_run_is_said() -> None:
    encoder = encoder_of("bert", "text-classification", 0.5)
    runner = sparse_cpu.load_encoder(encoder, threads=1)
    inputs = batch((4, 2))
    inputs["attention_mask"] = inputs["attention_mask"][:, ::-1].copy()
    with pytest.raises(ParedownError, match="padded behind"):
        runner.run(inputs)
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.run(batch((4,)))
    with pytest.raises(UnsupportedModel, match="multiples of 4"):
        odd = tiny("bert", hidden_size=30, num_attention_heads=3)
        sparse_cpu.load_encoder(Encoder(odd, describe(odd).layout).eval(), threads=1)
