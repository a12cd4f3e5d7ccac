"""The subcommand fewshot: what it hands on, what it shows and leaves behind, and what it refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paredown.cli import main
from paredown.cli._app import command

if TYPE_CHECKING:
    from conftest import Fake

ASKED = ["fewshot", "./model", "--data", "train.csv"]


def ends(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


FACTS: dict[str, Any] = {
    "model": "./model",
    "data": "train.csv",
    "eval": "test.csv",
    "models": [{"name": "model", "kind": "dense"}, {"name": "slim", "kind": "bundle"}],
    "classes": 77,
    "pool": 9999,
    "samples": 3080,
    "seeds": 10,
    "shots": [1, 5],
    "rows": [
        {"shots": k, "model": name, "accuracy": ends(a), "weighted_f1": ends(a - 0.02), "difference": difference}
        for k, name, a, difference in (
            (1, "model", 0.5234, None),
            (1, "slim", 0.5, {"accuracy": ends(-0.0234), "weighted_f1": ends(-0.03)}),
            (5, "model", 0.7, None),
            (5, "slim", 0.71, {"accuracy": ends(0.01), "weighted_f1": ends(0.0)}),
        )
    ],
    "timing": {
        "against": "model",
        "texts": 128,
        "rows": [
            {"name": "model", "target": "torch", "texts_per_second": 300.0, "speedup": None},
            {"name": "slim", "target": "torch", "texts_per_second": 630.0, "speedup": ends(2.1)},
        ],
    },
    "notes": ["3 texts were <dropped>."],
    "machine": {"cpu": "a CPU", "cores": 2},
}


@pytest.fixture
def learnt(fake: Fake) -> Fake:
    fake.facts = FACTS
    return fake


def test_every_option_is_handed_on(learnt: Fake) -> None:
    words = "--eval t.csv --against slim --against other/ --shots 5,1 --seeds 3 --text-column t --label-column l"
    words += " --max-length 32 --threads 2 --seed 7"
    assert main([*ASKED, *words.split()]) == 0
    assert learnt.calls[0][:2] == ("fewshot", ("./model",))
    assert learnt.asked == {
        **{"data": "train.csv", "eval": "t.csv", "against": ["slim", "other/"], "shots": [5, 1], "seeds": 3},
        **{"text_column": "t", "label_column": "l", "max_length": 32, "threads": 2, "seed": 7},
    }


def test_the_signatures_agree() -> None:
    from paredown import pipeline

    wanted = {n: p.default for n, p in inspect.signature(pipeline.fewshot).parameters.items() if n != "progress"}
    found = {p.name: p.default for p in command().commands["fewshot"].params if p.name not in ("json", "out")}
    assert set(found) == set(wanted)
    assert tuple(int(k) for k in found["shots"].split(",")) == wanted["shots"]
    for name in ("seeds", "eval", "max_length", "threads", "seed", "text_column", "label_column"):
        assert found[name] == wanted[name], name


def test_the_table_says_what_was_found(learnt: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASKED) == 0
    out = capsys.readouterr().out
    for said in ("77 labels", "3,080 test texts", "10 draws", "52.34 [51.34, 53.34]", "−2.34 [−3.34, −1.34]"):
        assert said in out
    assert "630" in out and "2.10×" in out and "against model" in out
    assert "3 texts were <dropped>." in out


def test_a_folder_gets_lines_and_a_page(learnt: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--out", str(tmp_path / "o"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == FACTS
    lines = [json.loads(line) for line in (tmp_path / "o" / "fewshot.jsonl").read_text().splitlines()]
    assert lines[1:] == FACTS["rows"] and lines[0]["timing"] == FACTS["timing"]
    page = (tmp_path / "o" / "fewshot.html").read_text()
    assert page.count("<svg") == 3 and "&lt;dropped&gt;" in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("shots", ["1,a", "0,1", "-3", "1.5", "10%", ",", ""])
def test_shots_are_whole_numbers(learnt: Fake, capsys: pytest.CaptureFixture[str], shots: str) -> None:
    assert main([*ASKED, f"--shots={shots}"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "is not a number of shots: write whole numbers, such as 1,2,5" in shown
    assert shown.count("\n") == 1 and not learnt.calls


def test_a_folder_that_cannot_be_is_told_before_anything_is_done(
    learnt: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([*ASKED, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err and not learnt.calls
