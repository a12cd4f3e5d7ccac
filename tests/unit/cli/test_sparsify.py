"""The command that makes zeros hands on what it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paredown.cli import main

if TYPE_CHECKING:
    from conftest import Fake

SPARSIFY = ["sparsify", "./model", "--data", "train.csv", "--out", "slim"]


def test_every_option_is_handed_on(fake: Fake) -> None:
    words = ["--sparsity", "80%", "--pattern", "4x1", "--solver", "alps", "--allocation", "owl", "--rounds", "3"]
    words += [
        "--schedule",
        "exponential",
        "--recover",
        "finetune",
        "--layers",
        "2",
        "--max-drop",
        "1%",
        "--minutes",
        "5",
    ]
    assert main([*SPARSIFY, *words, "--target", "onnxruntime", "--permute"]) == 0
    name, given, asked = fake.calls[0]
    assert name == "sparsify" and given == ("./model",)
    wanted = {"sparsity": 0.8, "pattern": "4x1", "solver": "alps", "allocation": "owl", "rounds": 3, "layers": 2.0}
    wanted |= {"schedule": "exponential", "recover": "finetune", "max_drop": 0.01, "minutes": 5.0, "permute": True}
    wanted |= {"data": "train.csv", "out": "slim", "target": "onnxruntime", "neurons": 0.0}
    assert {key: asked[key] for key in wanted} == wanted


def test_n_of_m_needs_no_sparsity(fake: Fake) -> None:
    assert main([*SPARSIFY, "--pattern", "2:4"]) == 0
    assert fake.asked["sparsity"] is None and fake.asked["pattern"] == "2:4" and fake.asked["target"] == ""


def test_a_share_that_is_none_is_refused(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SPARSIFY, "--sparsity", "much"]) == 2
    assert not fake.calls and "is not an amount" in capsys.readouterr().err
