"""The page of a run: what it says, that it cannot crash, and that nothing in it can run or be fetched."""

from __future__ import annotations

import copy
import os
import re
import runpy
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from paredown.errors import ParedownError
from paredown.report import html, words

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The tags with their attributes, and the visible text; fails on a tag that is closed out of order."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(result: dict[str, Any]) -> Page:
    return Page(html.render(result))


def without_one(value: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a fact sheet, in each of which one value, at any depth, is missing, None or of the wrong kind."""
    for path in paths(value):
        for change in (None, "text", float("nan"), -1):
            other = copy.deepcopy(value)
            spot = other
            for step in path[:-1]:
                spot = spot[step]
            spot[path[-1]] = change
            yield f"{path} = {change!r}", other


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value, in lists to the first entry only: the others are alike."""
    entries = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    )
    for name, item in entries:
        yield (name,)
        yield from ((name, *rest) for rest in paths(item))


@pytest.mark.parametrize("name", samples.ALL)
def test_page_is_well_formed_and_self_contained(name: str) -> None:
    source = html.render(samples.ALL[name]())
    for tag, attributes in Page(source).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "xlink:href", "action"} & set(attributes)
        assert not [a for a in attributes if a.startswith("on")]
    assert "url(" not in source
    assert "@import" not in source
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<text.*?</text>|<title.*?</title>|aria-label=\"[^\"]*\"", "", svg)


def test_accepted_page_says_the_figures_and_how_they_were_measured() -> None:
    text = page(samples.accepted()).text
    for said in (
        "✓ Accepted",
        "5.2 times as many texts per second",
        "5.23×",
        "the texts per second of onnxruntime fp32 dense",
        "95 % interval 5.11 to 5.36",
        "92.56 %",
        "dense: 92.99 %",
        "drop 0.43 points 95 % interval −0.24 to 1.14 test split",
        "1.18 ms",
        "dense: 4.07 ms",
        "34 % removed",
        "one-sided 90 % upper bound",
        "5 of 6 layers, 20 of 72 heads, 2,560 of 9,216 FFN neurons (28 %)",
        "whole layer dropped",
        "attention removed",
        "chosen: the fastest that passed",
        "failed: bound 1.49 > 1 point",
        "not tried: a faster one passed",
        "12 texts of --data also stood in --eval and were dropped from calibration.",
        "paredown prune ./my-classifier",
        "−5.3 %",
        "Xeon",
    ):
        assert said in text, said
    assert "Rejected" not in text


def test_rejected_page_says_so_first_and_calls_nothing_accepted() -> None:
    parsed = page(samples.rejected())
    assert parsed.text.index("✕ Rejected") < parsed.text.index("No bundle was accepted")
    assert ("body", {"class": "rejected"}) in parsed.tags
    assert "failed, the closest candidate: bound 1.48 > 1 point" in parsed.text
    assert "✓" not in parsed.text
    assert "The closest candidate keeps" in parsed.text
    assert "chosen:" not in parsed.text


def test_a_rejected_page_shows_no_cut_where_the_closest_is_dense() -> None:
    result = {**samples.rejected(), "kept": []}
    assert f"Nothing was cut: {words.chosen(result)['name']} is the closest candidate." in page(result).text


def test_page_advises_against_pruning() -> None:
    text = page(samples.unpruned()).text
    assert "! Do not prune" in text
    assert "Nothing was cut: dense int8 is recommended." in text
    assert "physically gone" not in text
    assert "0.909×" in text  # a slower cell is shown as it is


def test_a_metric_that_is_no_share_is_not_shown_in_per_cent() -> None:
    text = page(samples.embedding()).text
    assert "Mean cosine 0.9861 dense: 1.0000" in text
    assert "drop 0.0139" in text
    assert "failed: bound 0.0293 > 0.02" in text
    assert "98.61" not in text


def test_a_language_model_shows_its_rounds_and_how_it_writes() -> None:
    text = page(samples.language_model()).text
    for said in (
        "Perplexity 6.686 dense: 5.529",
        "drop 20.92 %",
        "chosen: the size that was asked for",
        "2 222 k 6.890 6.234",
        "16 texts of 256 tokens",
        "The pruned model loops.",
        "longest loop, tokens 222 256",
        "tokens per second 349 380",
    ):
        assert said in text, said
    assert "Generation" not in page(samples.accepted()).text


def test_a_page_on_pictures_says_what_is_left_of_the_channels() -> None:
    parsed = page(samples.pictures())
    for said in (
        "16 of 30 groups of channels are narrower, 692 of 1,120 channels stay, 5 of 27 residual branches are gone, "
        "48 % of the multiply-accumulates stay. What is cut is physically gone",
        "MACs 60.2 M dense: 125 M 52 % removed multiply-accumulates of one picture; reported, never called speed",
        "image-classification · served by onnxruntime",
        "371 → 1,010 pictures/s",
        "one picture at a time",
        "pictures per second (log scale",
        "a single channel: gate.0.weight, gate.1.weight, gate.2.weight and 2 more",
        "the network's answer: linear.weight",
        "By batch size",
        "batch 1 batch 8 batch 64",
        "The loss (cross-entropy, in nats) on held-out pictures",
        "Split Pictures Used",
    ):
        assert said in parsed.text, said
    assert "Pictures per second" in {attributes.get("data-label") for _, attributes in parsed.tags}
    assert "In the closest candidate, 257 of 300 groups" in page(samples.deep_pictures()).text


@pytest.mark.parametrize("name", ["pictures", "deep_pictures"])
def test_a_page_on_pictures_speaks_of_no_texts(name: str) -> None:
    parsed = page(samples.ALL[name]())
    said = [parsed.text, *(str(a[key]) for _, a in parsed.tags for key in ("data-label", "aria-label") if key in a)]
    assert not [one for one in said if re.search("texts?\\b|token|neuron|heads", one, re.IGNORECASE)]


@pytest.mark.parametrize("name", sorted({*samples.ALL} - {"pictures", "deep_pictures"}))
def test_a_page_on_texts_speaks_of_no_pictures(name: str) -> None:
    text = page(samples.ALL[name]()).text
    assert not re.search("picture|channel|branch|accumulate", text, re.IGNORECASE)


def test_what_is_asked_for_on_pictures_is_per_picture() -> None:
    result = {**samples.pictures(), "objective": {"dial": "latency_ms", "value": 5.0, "max_drop": 0.01}}
    assert words.asked(result) == "at most 5.00 ms per picture and a loss of at most 1 point of accuracy"
    assert words.asked({**result, "task": "text-classification"}).startswith("at most 5.00 ms per text and")


def test_what_is_slower_is_not_called_faster() -> None:
    result = samples.pictures()
    gain = dict(result["latency_speedup"])
    assert f"{words.times(gain['value'])} faster" in page(result).text
    result["latency_speedup"] = {**gain, "value": 0.64, "low": 0.6, "high": 0.7}
    text = page(result).text
    assert "0.640× as fast" in text and "0.640× faster" not in text


def test_a_network_of_which_nothing_was_cut_says_so() -> None:
    result = samples.pictures()
    result["channels"] = [{**row, "kept": row["channels"]} for row in result["channels"]]
    assert "physically gone" in page(result).text  # branches are gone still
    result["branches"] = [{**branch, "gone": False} for branch in result["branches"]]
    text = page(result).text
    assert "Nothing was cut: pruned 1.8x int8 is recommended." in text
    assert "physically gone" not in text


def test_reasons_to_leave_tensors_whole_are_few() -> None:
    reasons = {f"layer.{i}.weight": f"reason {i} (node_{i})" for i in range(6)} | {"more.weight": "reason 5 (other)"}
    found = html.view({**samples.pictures(), "whole": reasons})["channels"]["whole"]
    assert found == [
        "reason 5: layer.5.weight, more.weight",
        "reason 0: layer.0.weight",
        "reason 1: layer.1.weight",
        "3 tensors for other reasons",
    ]


@pytest.mark.parametrize("facts", [{}, {"accepted": False}, {"accepted": True}, {"candidates": [{}], "kept": [{}]}])
def test_an_almost_empty_fact_sheet_gives_a_page(facts: dict[str, Any]) -> None:
    assert ("Accepted" if facts.get("accepted") else "Rejected") in page(facts).text


@pytest.mark.parametrize("name", ["accepted", "pictures"])
def test_no_single_value_can_break_the_page(name: str) -> None:
    short = samples.ALL[name]()
    for name in {"candidates", "kept", "timings", "recovery", "prediction", "channels", "branches"} & {*short}:
        short[name] = short[name][-2:]  # a failed candidate and a slow one are enough, and quick
    short["candidates"][0].update(chosen=True, passed=True)
    for what, facts in without_one(short):
        try:
            html.render(facts)
        except Exception as error:
            raise AssertionError(what) from error


def test_minimal_page_leaves_empty_sections_out() -> None:
    text = page(samples.minimal()).text
    for heading in ("Every candidate", "Time, measured", "Recovery", "Machine", "Reproduce it"):
        assert heading not in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    "text", ['<script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "</style><script>", "{{ 7 * 7 }} &amp; '"]
)
@pytest.mark.parametrize("name", ["accepted", "pictures"])
def test_hostile_text_is_only_ever_text(text: str, name: str) -> None:
    parsed = page(samples.hostile(text, name))
    plain = page(samples.hostile("x", name))
    names = [tag for tag, _ in parsed.tags if tag not in ("text", "line", "title")]
    # The labels' places depend on the length of their text; every other element is the same one.
    assert names == [tag for tag, _ in plain.tags if tag not in ("text", "line", "title")]
    assert {name for _, a in parsed.tags for name in a} == {name for _, a in plain.tags for name in a}
    assert re.sub(r"\s+", " ", text) in parsed.text


def test_a_lone_surrogate_in_a_path_does_not_stop_the_page(tmp_path: Path) -> None:
    path = html.write({**samples.accepted(), "model": "models/\udcff"}, tmp_path / "report.html")
    assert "models/?" in path.read_text(encoding="utf-8")


def test_write_gives_the_path_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert html.write(samples.accepted(), path) == path
    assert path.read_text(encoding="utf-8") == html.render(samples.accepted())
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("step", [(Path, "write_bytes"), (os, "replace")])
def test_a_failed_write_keeps_the_old_page(
    step: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*step, full)
    with pytest.raises(ParedownError, match=r"report\.html cannot be written: No space left on device\."):
        html.write(samples.accepted(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ParedownError, match="cannot be written: No such file or directory"):
        html.write(samples.accepted(), tmp_path / "nowhere" / "report.html")


def test_the_fact_sheet_is_not_changed() -> None:
    result = samples.accepted()
    html.render(result)
    assert result == samples.accepted()
