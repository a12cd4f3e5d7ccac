"""The tables for the terminal."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from paredown.report import terminal

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))


def printed(what: RenderableType, *, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(what)
    return out.getvalue()


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("width", [50, 80, 140])
def test_summary_fits_every_width(name: str, width: int) -> None:
    said = printed(terminal.summary(samples.ALL[name]()), width=width)
    assert max(map(len, said.splitlines())) <= width
    assert "None" not in said


def test_summary_says_verdict_and_reasons() -> None:
    said = printed(terminal.summary(samples.accepted()))
    assert "Accepted: 5.2 times as many texts per second" in said
    assert "5.23× [5.11 to 5.36] the texts per second of onnxruntime fp32 dense" in said
    assert "accuracy 92.99 % → 92.56 %, drop 0.43 points [−0.24 to 1.14] (test split)" in said
    assert "failed: bound 1.49 > 1 point" in said
    assert "bundle: slim/" in said


def test_summary_of_a_run_on_pictures_counts_pictures() -> None:
    said = printed(terminal.summary(samples.pictures()))
    assert "pictures/s" in said
    assert "2.72× [2.66 to 2.79] the pictures per second of openvino fp32 dense" in said
    assert "multiply-accumulates 125 M → 60.2 M (reported, never called speed)" in said
    assert "text" not in said


def test_summary_of_a_rejected_run_names_no_bundle() -> None:
    said = printed(terminal.summary({**samples.rejected(), "bundle": "slim/"}))
    assert "Rejected: No candidate met the gate" in said
    assert "bundle:" not in said


def test_texts_are_not_read_as_markup() -> None:
    result = samples.accepted()
    result["verdict"] = "[red]wrong[/] [/nothing]"
    result["candidates"][0]["name"] = "[bold]model[/bold] [/x]"
    said = printed(terminal.summary(result))
    assert "[red]wrong[/] [/nothing]" in said
    assert "[bold]model[/bold]" in said
    assert "[/x]" in printed(terminal.bench_table([{"name": "[/x]"}]))


def test_bench_table_shows_the_columns_that_are_filled() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "./dense", "texts_per_second": 350.0, "latency_ms_p50": 4.1, "speedup": None, "quality": 0.93},
        {
            "name": "slim/",
            "texts_per_second": 1500.0,
            "latency_ms_p50": 1.2,
            "speedup": {"value": 4.29, "low": 4.2, "high": 4.4},
            "quality": 0.925,
        },
    ]
    said = printed(terminal.bench_table(rows, metric="accuracy", against="./dense"))
    assert "4.29× [4.20 to 4.40]" in said
    assert "92.50 %" in said
    assert "against ./dense" in said
    assert "p90" not in said
    assert "texts" not in printed(terminal.bench_table(rows, against="./dense", items="pictures"))
    assert printed(terminal.bench_table([])).strip() == ""


@pytest.mark.parametrize("facts", [{}, {"candidates": [{}]}, {"accepted": True, "candidates": None, "speedup": None}])
def test_an_almost_empty_fact_sheet_gives_a_summary(facts: dict[str, Any]) -> None:
    assert ("Accepted" if facts.get("accepted") else "Rejected") in printed(terminal.summary(facts))
