"""The pictures: labels that do not overlap, scales that are right, figures put in words."""

from __future__ import annotations

import re
import runpy
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from paredown.report import _charts as charts
from paredown.report import _heat as heat
from paredown.report import _svg as draw
from paredown.report import words
from paredown.report._pareto import pareto

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))


def elements(svg: str, css: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if css in (e.get("class") or "").split()]


@pytest.mark.parametrize("name", ["accepted", "rejected", "unpruned", "embedding", "crowded"])
@pytest.mark.parametrize("width", [860.0, 360.0])
def test_labels_of_the_candidates_do_not_overlap(name: str, width: float) -> None:
    svg = pareto(samples.ALL[name](), width)
    boxes = []
    for label in elements(svg, "label"):
        half, x, y = draw.text_width(label.text or "") / 2, float(label.get("x", 0)), float(label.get("y", 0))
        boxes.append((x - half, y - 10, x + half, y + 3))
    shown = [c for c in samples.ALL[name]()["candidates"] if c["quality"] is not None]
    assert len(boxes) == len(elements(svg, "mark")) == len(shown)
    assert all(draw.overlap(a, b) == 0 for a, b in combinations(boxes, 2))
    assert all(box[0] >= 0 and box[2] <= width for box in boxes)


def test_the_gate_divides_the_bounds_as_the_gate_decided() -> None:
    result = samples.accepted()
    svg = pareto(result, 860.0)
    gate = float(elements(svg, "gate")[0].get("y1", 0))
    assert [float(e.get("y1", 0)) < gate for e in elements(svg, "bound") if "passed" in e.get("class", "")] == [True]
    assert [float(e.get("y1", 0)) < gate for e in elements(svg, "bound") if "chosen" in e.get("class", "")] == [True]
    failed = [float(e.get("y1", 0)) > gate for e in elements(svg, "bound") if "failed" in e.get("class", "")]
    assert failed == [True, True]
    assert len(elements(svg, "ring")) == 1


def test_faster_is_to_the_right_and_better_is_up() -> None:
    marks = {
        (e.find("title").text or "").split(":")[0]: e  # type: ignore[union-attr]
        for e in elements(pareto(samples.accepted(), 860.0), "mark")
    }
    slow, fast = marks["pruned 4x"], marks["dense openvino"]
    assert float(slow.get("cx", 0)) > float(fast.get("cx", 0))
    assert float(slow.get("cy", 0)) > float(fast.get("cy", 0))


def test_picture_of_what_is_kept_counts_right() -> None:
    svg = charts.kept(samples.accepted(), 860.0)
    cells = elements(svg, "cell")
    gone = [c for c in cells if "gone" in c.get("class", "")]
    assert len(cells) == 4 * 12  # layer 3 has no attention left, layer 4 is dropped
    assert len(cells) - len(gone) == 20
    bars = [float(b.get("width", 0)) for b in elements(svg, "bar") if "gone" not in b.get("class", "")]
    full = float(elements(svg, "bar")[0].get("width", 0))
    assert [round(b / full, 2) for b in bars] == [0.5, 0.42, 0.33, 0.25, 0.17]


def test_a_layer_outside_the_model_is_not_drawn() -> None:
    result = samples.accepted()
    result["kept"].append({"layer": 99, "heads": [0, 500], "neurons": 10**9})
    assert charts.kept(result, 860.0) == charts.kept(samples.accepted(), 860.0)


@pytest.mark.parametrize("width", [860.0, 360.0])
def test_picture_of_channels_has_a_bar_for_every_group_and_none_for_what_is_gone(width: float) -> None:
    result = samples.pictures()
    svg = charts.channels(result, width)
    bars = elements(svg, "bar")
    whole, stay = (
        [float(b.get("width", 0)) for b in bars if ("gone" in b.get("class", "")) == x] for x in (True, False)
    )
    rows = [row for row in result["channels"] if row["kept"]]
    assert [round(b / a, 2) for a, b in zip(whole, stay, strict=True)] == [
        round(row["kept"] / row["channels"], 2) for row in rows
    ]
    assert len(elements(svg, "gone-layer")) == len(result["channels"]) - len(rows) == 5
    assert [e.text for e in elements(svg, "gone-label")] == ["branch removed"] * 5
    assert "12 of 16" in svg


@pytest.mark.parametrize("count", [1, 24, 30, 73, 150, 240, 300])
@pytest.mark.parametrize("width", [860.0, 360.0])
def test_many_groups_of_channels_stay_a_picture_of_some_height_with_words_that_do_not_touch(
    count: int, width: float
) -> None:
    result = {"channels": samples.deep_pictures()["channels"][:count]}
    root = ElementTree.fromstring(charts.channels(result, width))
    _, _, wide, height = map(float, root.get("viewBox", "").split())
    texts = [e for e in root.iter() if e.tag.endswith("text") and e.get("class") == "tick"]
    names = [e for e in texts if e.get("text-anchor") == "end"]
    assert height < 1020
    assert len(names) == min(count, 240) if count <= 73 else 40 < len(names) < count
    heights = [float(e.get("y", 0)) for e in names]
    assert all(below - above >= 12.9 for above, below in zip(heights, heights[1:], strict=False))
    for e in texts:
        x, reach = float(e.get("x", 0)), draw.text_width(e.text or "", size=11.5)
        assert x - reach >= -1 if e in names else x + reach <= wide + 1
    assert ("and 60 groups more" in "".join(root.itertext())) == (count == 300)


def test_long_names_of_groups_keep_their_ends() -> None:
    svg = charts.channels(samples.deep_pictures(), 360.0)
    assert elements(svg, "tick")[0].text == "…ttention.conv0"


def test_recovery_has_one_line_per_candidate_and_falls() -> None:
    lines = elements(charts.recovery(samples.accepted(), 860.0), "series")
    assert len(lines) == 3
    heights = [float(pair.split(",")[1]) for pair in lines[0].get("points", "").split()]
    assert heights == sorted(heights)  # downwards on the page


@pytest.mark.parametrize("edges", [[0, 8, 16, 64], [0, 8, 16]])
def test_histogram_takes_all_edges_or_lower_edges(edges: list[int]) -> None:
    bars = elements(charts.lengths({"lengths": {"edges": edges, "counts": [1, 4, 2]}}, 860.0), "bar")
    heights = [float(bar.get("height", 0)) for bar in bars]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.02)
    assert len({bar.get("width") for bar in bars}) == 1


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.9199, 0.9302, False), (24, 58, True), (200, 9800, True), (3, 3.1, True)]
)
def test_ticks_lie_inside_the_scale(low: float, high: float, log: bool) -> None:
    scale = draw.Scale(low, high, 0.0, 100.0, log=log)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 8
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_spread_keeps_the_gap_and_the_order() -> None:
    found = draw.spread([50, 51, 10, 52], gap=13, low=0, high=100)
    assert min(b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)) >= 13 - 1e-9
    assert sorted(range(4), key=lambda i: found[i]) == [2, 0, 1, 3]
    assert all(0 <= value <= 100 for value in draw.spread([99, 99, 99], gap=13, low=0, high=100))


@pytest.mark.parametrize(
    ("value", "said"),
    [(1234.5, "1,234"), (0.012345, "0.0123"), (99.96, "100"), (4.1, "4.10"), (-0.0, "0"), (None, "–"), ("x", "–")],
)
def test_figures(value: object, said: str) -> None:
    assert words.figure(value) == said


def test_a_bound_just_over_the_budget_is_not_rounded_onto_it() -> None:
    result = {"quality_metric": "accuracy", "objective": {"dial": "max_drop", "max_drop": 0.01}}
    assert words.reason(result, {"passed": False, "bound": 0.01004}) == "failed: bound 1.004 > 1 point"


def test_a_note_is_added_to_the_reason_or_replaces_it() -> None:
    assert words.reason({}, {"kind": "pruned", "note": "for comparison"}) == "for comparison"
    passed = {"kind": "pruned", "passed": True, "note": "for comparison"}
    assert words.reason({}, passed) == "passed; for comparison"
    assert words.reason({}, {"kind": "pruned", "note": "not tried: no time left"}) == "not tried: no time left"


def test_drop_words_have_true_minus_signs_and_no_minus_zero() -> None:
    assert words.drop("accuracy", -0.0024) == "−0.24 points"
    assert words.drop("accuracy", -0.00001) == "0.00 points"
    assert not re.search("-", words.drop("cosine", -0.002))


@pytest.mark.parametrize(("low", "high"), ((1e-13, 1e-11), (1e-12, 1.0), (1e-16, 3e-3), (0.5, 0.9)))
def test_a_log_scale_has_ticks_inside_it_however_far_it_reaches(low: float, high: float) -> None:
    """A student that differs from the dense model by rounding alone has a divergence of 1e-12."""
    scale = draw.Scale(low, high, 0.0, 100.0, log=True)
    assert len(scale.ticks()) >= 2
    assert all(-1e-6 <= scale(tick) <= 100.000001 for tick in scale.ticks())


@pytest.mark.parametrize("metric", ["accuracy", "log_likelihood", "cosine"])
def test_a_curve_has_room_for_what_its_ticks_say(metric: str) -> None:
    rows = [
        {"unit": "channels", "criterion": "l2", "fraction": share, "drop": {"value": lost, "low": lost, "high": lost}}
        for share, lost in ((0.1, 0.08), (0.5, 0.83))
    ]
    (_, svg), *_ = heat.curves({"quality_metric": metric, "rows": rows})
    ticks = [tick for tick in elements(svg, "tick") if tick.get("text-anchor") == "end"]
    assert len(ticks) > 2
    assert all(float(tick.get("x", 0)) >= draw.text_width(tick.text or "") for tick in ticks)
