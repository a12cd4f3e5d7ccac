"""bench-sparse hands on what it was given, and shows what came back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paredown.cli import main

if TYPE_CHECKING:
    from conftest import Fake

ENGINES = {"torch dense": (1.0, 1.0), "torch sparse CSR": (0.5, 0.8), "paredown unstructured": (1.2, 4.5)}


def facts() -> dict[str, Any]:
    rows = [
        {
            **{"inputs": 384, "outputs": 1536, "engine": name, "sparsity": sparsity, "milliseconds": 1 / value},
            **{"speedup": {"value": value, "low": value - 0.1, "high": value + 0.1}, "gflops": 100.0},
            **{"dense_gflops": 200.0, "share_of_peak": 0.5},
        }
        for name, values in ENGINES.items()
        for sparsity, value in zip((0.5, 0.9), values, strict=True)
    ]
    even = [
        {"inputs": 384, "outputs": 1536, "engine": "torch sparse CSR", "sparsity": None},
        {"inputs": 384, "outputs": 1536, "engine": "paredown unstructured", "sparsity": 0.5},
    ]
    about = {"tokens": 1024, "threads": 2, "level": "avx2", "peak_gflops": 200.0, "device": "cpu"}
    return {"rows": rows, "breaks_even": even, **about, "machine": {"cpu": "a CPU", "cores": 2}}


def test_every_option_is_handed_on(fake: Fake) -> None:
    fake.facts = facts()
    words = ["--sizes", "8x16, 16X8", "--sparsity", "50%,.9", "--pattern", "4x1", "--tokens", "64", "--rounds", "5"]
    assert main(["bench-sparse", *words, "--threads", "1", "--seed", "3"]) == 0
    name, given, asked = fake.calls[0]
    assert name == "bench_sparse" and given == ([(8, 16), (16, 8)],)
    wanted = {"sparsities": [0.5, 0.9], "patterns": ["4x1"], "tokens": 64, "rounds": 5, "threads": 1, "seed": 3}
    assert asked == {**wanted, "device": "cpu"}


def test_the_table_says_where_it_pays(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.facts = facts()
    assert main(["bench-sparse"]) == 0
    shown = capsys.readouterr().out
    assert "4.50 [4.40, 4.60]" in shown and "avx2 kernels" in shown and "50 %" in shown
    assert "384 to 1536: torch sparse CSR is slower than dense at every sparsity tried." in shown
    assert "384 to 1536: paredown unstructured is faster than dense from 50 % zeros on." in shown


def test_a_page_with_a_picture_and_lines_of_json(fake: Fake, tmp_path: Path) -> None:
    fake.facts = facts()
    assert main(["bench-sparse", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "bench-sparse.html").read_text()
    assert page.count("<polyline") == 2 and "4.50×" in page and "dense</text>" in page
    lines = [json.loads(line) for line in (tmp_path / "out" / "bench-sparse.jsonl").read_text().splitlines()]
    assert lines[0]["tokens"] == 1024 and lines[1:] == facts()["rows"]


@pytest.mark.parametrize("size", ["384", "axb", "0x8", "8x", "384x1536x2"])
def test_what_is_no_size(size: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-sparse", "--sizes", size]) == 2
    assert "is not a size" in capsys.readouterr().err and not fake.calls
