"""Where sparsity begins to pay: every engine computes the product, and the figures are made right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.errors import ParedownError
from paredown.pipeline import bench_sparse
from paredown.pipeline._bench_sparse import OURS, _breaks_even, _Product, _zeroed
from paredown.pipeline._bench_sparse_gpu import CSR, DENSE, as_rows, interleaved, products
from paredown.sparsity import Pattern

SIZE = (48, 64)


def test_a_small_run_from_end_to_end() -> None:
    facts = bench_sparse([SIZE], sparsities=(0.5, 0.9), tokens=70, threads=1, rounds=3)
    rows = facts["rows"]
    engines = [DENSE, CSR, f"{OURS}unstructured", f"{OURS}4x1"]
    assert [row["engine"] for row in rows] == [name for name in engines for _ in range(2)]
    assert all(row["inputs"] == 48 and row["outputs"] == 64 and row["milliseconds"] > 0 for row in rows)
    for row in rows:
        share = 1 if row["engine"] == DENSE else 1 - row["sparsity"]
        assert row["gflops"] == pytest.approx(share * row["dense_gflops"])
        assert row["dense_gflops"] == pytest.approx(2 * 48 * 64 * 70 / row["milliseconds"] / 1e6)
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / facts["peak_gflops"])
    assert [row["speedup"]["value"] for row in rows[:2]] == [1.0, 1.0]
    assert [one["engine"] for one in facts["breaks_even"]] == engines[1:]
    assert facts["peak_gflops"] > 1 and facts["level"] in ("avx512", "avx2", "plain")


@pytest.mark.parametrize("engine", ["unstructured", "4x1", "8x1"])
def test_ours_is_the_product(engine: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, x = random.standard_normal((64, 48), np.float32), random.standard_normal((70, 48), np.float32)
    np.savez(tmp_path / "product.npz", weight=weight, x=x)
    one = _Product(str(tmp_path / "product.npz"), 1, OURS + engine, (0.5, 0.9), 1)
    pattern = Pattern.parse(engine)
    for which, sparsity in enumerate((0.5, 0.9)):
        call = one._calls[which]
        call()
        y = one.y
        kept = _zeroed(weight, pattern, sparsity)
        assert float((kept == 0).mean()) == pytest.approx(sparsity, abs=0.02)
        np.testing.assert_allclose(y.transpose(0, 2, 1).reshape(-1, y.shape[1])[:70, :64], x @ kept.T, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sizes": []}, "nothing to time"),
        ({"tokens": 0}, "nothing to time"),
        ({"sparsities": (1.0,)}, "from 0 to below 1"),
        ({"sizes": [(0, 4)]}, "both above 0"),
        ({"patterns": ("2:4",)}, "says its sparsity itself"),
        ({"patterns": ("4x1",), "sizes": [(8, 6)]}, "do not divide into 4x1"),
        ({"patterns": ("wild",)}, "no pattern"),
        ({"device": "tpu"}, "choose cpu or cuda"),
    ],
)
def test_what_cannot_be_timed(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ParedownError, match=words):
        bench_sparse(**{"sizes": [SIZE], **asked})


def row(sparsity: float, speedup: float) -> dict[str, Any]:
    class Interval:
        value = speedup

    return {"inputs": 1, "outputs": 2, "engine": "e", "sparsity": sparsity, "speedup": Interval}


def test_it_breaks_even_where_all_above_is_faster() -> None:
    rows = [row(0.5, 1.1), row(0.7, 0.9), row(0.8, 1.2), row(0.9, 2.0)]
    assert _breaks_even(rows, 1, 2, "e") == 0.8
    assert _breaks_even([*rows, row(0.95, 0.9)], 1, 2, "e") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said() -> None:
    with pytest.raises(ParedownError, match="no CUDA GPU"):
        bench_sparse([SIZE], device="cuda")


def test_every_engine_of_the_gpu_is_called_in_turn_and_its_rows_are_right() -> None:
    """With a clock of our own: the products themselves are run here on the CPU."""
    order: list[int] = []

    def clock(call: Callable[[], Any]) -> float:
        order.append(id(call))
        assert call().shape == (64, 8)
        return 2.0 if len(order) % 2 else 1.0

    calls = products(torch.randn(64, 48), torch.randn(48, 8), (0.5,))
    assert set(calls) == {(DENSE, 0.5), (CSR, 0.5)}  # 48 inputs are no multiple of 64
    a, b = (call() for call in calls.values())
    assert torch.allclose(a, b, atol=1e-4)
    advanced: list[int] = []
    taken = interleaved(calls, 3, clock, lambda: advanced.append(1))
    assert order == order[:2] * 4 and len(advanced) == 3
    rows = as_rows(taken, 48, 64, 8)
    assert [one["engine"] for one in rows] == [DENSE, CSR]
    assert rows[1]["speedup"].value == pytest.approx(2.0) and rows[1]["milliseconds"] == 1.0
    assert rows[1]["gflops"] == pytest.approx(rows[1]["dense_gflops"] / 2)
