"""The page and the tables of few-shot learning."""

from __future__ import annotations

import re
from typing import Any

import pytest

from paredown.report import fewshot


def ends(value: float, width: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - width / 2, "high": value + width / 2}


def facts(shots: tuple[int, ...] = (1, 5, 10), models: tuple[str, ...] = ("dense", "slim")) -> dict[str, Any]:
    rows = []
    for k in shots:
        for i, name in enumerate(models):
            quality = 0.5 + 0.03 * k - 0.1 * i
            apart = {"accuracy": ends(-0.1 * i), "weighted_f1": ends(-0.1 * i)} if i else None
            rows.append({"shots": k, "model": name, "accuracy": ends(quality), "weighted_f1": ends(quality - 0.01)})
            rows[-1]["difference"] = apart
    timed = [{"name": name, "texts_per_second": 100.0 * (i + 1)} for i, name in enumerate(models)]
    return {"data": "d.csv", "rows": rows, "timing": {"rows": timed, "texts": 128}, "seeds": 10, "classes": 3}


def points(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<{kind} points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in one.split()] for one in found]  # type: ignore[misc]


def test_a_line_and_a_band_for_every_model_at_the_height_of_its_figures() -> None:
    svg = fewshot.curve(facts(), "accuracy")
    dense, slim = points(svg, "polyline")
    assert len(dense) == len(slim) == 3 and len(points(svg, "polygon")) == 2
    assert [y for _, y in dense] == sorted((y for _, y in dense), reverse=True)  # upwards on the page
    assert all(a[1] < b[1] and a[0] == b[0] for a, b in zip(dense, slim, strict=True))
    for line, band in zip((dense, slim), points(svg, "polygon"), strict=True):
        highs, lows = band[:3], band[3:][::-1]
        assert all(h[1] < v[1] < low[1] for h, v, low in zip(highs, line, lows, strict=True))
    assert fewshot.curve(facts(shots=(5,)), "accuracy") == ""


def test_bars_are_as_long_as_they_are_fast() -> None:
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', fewshot.bars(facts()))]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)


def test_the_table_has_differences_only_where_models_are_compared() -> None:
    head, rows = fewshot.table_of(facts())
    assert head[4:] == ["Δ accuracy", "Δ weighted F1"]
    assert "in points, against dense on the same draws" in fewshot.compared_with(facts())
    assert rows[1] == [
        "1",
        "slim",
        "43.00 [42.00, 44.00]",
        "42.00 [41.00, 43.00]",
        *["−10.00 [−11.00, −9.00]"] * 2,
    ]
    assert rows[0][4:] == ["", ""]
    head, rows = fewshot.table_of(facts(models=("dense",)))
    assert fewshot.compared_with(facts(models=("dense",))) == ""
    assert len(head) == 4 and all(len(row) == 4 for row in rows)
