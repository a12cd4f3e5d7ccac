"""Proving a bundle again, and two things side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

import paredown
from paredown.bundle import Bundle
from tests.contracts.families import save, tiny, tiny_tokenizer
from tests.unit.pipeline.conftest import Desk


@pytest.fixture(scope="session")
def made(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "slim"
    paredown.prune(desk.model, data=desk.train, eval=desk.test, out=out, speedup=1.01, minutes=0, threads=1)
    return out


def test_validate_measures_the_claim_again(made: Path, desk: Desk) -> None:
    facts = paredown.validate(made, eval=desk.test, threads=1)
    claim = paredown.load(made).report()
    assert facts["quality_dense"] == 1.0
    assert facts["samples"] == len(desk.test.read_text().splitlines()) - 1
    assert facts["quality_pruned"] == pytest.approx(claim["quality_pruned"], abs=0.1)
    assert facts["parity"] is not None and facts["parity"] < 1e-4
    assert facts["accepted"] is (facts["speedup"]["value"] >= 0.95 * 1.01), facts["verdict"]


def test_validate_says_no_to_a_budget_that_is_not_met(made: Path, desk: Desk) -> None:
    facts = paredown.validate(made, eval=desk.test, max_drop=0.0, threads=1)
    assert facts["accepted"] is False
    assert "bound on the drop" in facts["verdict"]


def test_validate_takes_the_columns_of_the_run_that_made_it(
    made: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = paredown.load(made).report()
    assert claim["columns"]["text_column"] is None
    changed = {**claim, "columns": {**claim["columns"], "text_column": "no such column"}}
    monkeypatch.setattr(Bundle, "report", lambda self: changed)
    with pytest.raises(paredown.BadData, match="no such column"):
        paredown.validate(made, eval=desk.test, threads=1)


def test_bench_needs_one_vocabulary_for_the_texts_of_a_file(made: Path, desk: Desk, tmp_path: Path) -> None:
    other = save(tiny("roberta"), tmp_path / "other")
    tiny_tokenizer("roberta").save_pretrained(other)
    with pytest.raises(paredown.ParedownError, match="different vocabularies"):
        paredown.bench(made, other, eval=desk.test, threads=1)


def test_bench_of_a_model_and_its_bundle(made: Path, desk: Desk) -> None:
    facts = paredown.bench(desk.model, made, threads=1)
    assert {row["name"].split()[-1] for row in facts["rows"]} >= {"torch", "onnxruntime", "openvino"}
    assert facts["speedup"]["low"] <= facts["speedup"]["value"] <= facts["speedup"]["high"]


def test_bench_of_a_bundle_with_itself_times_it_twice(made: Path) -> None:
    facts = paredown.bench(made, made, threads=1)
    assert [row["name"] for row in facts["rows"]] == [str(made), f"{made} (again)"]
