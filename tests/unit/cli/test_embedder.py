"""What `embedder train` and `embedder distill` hand on, show, and say when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paredown.cli import main
from paredown.errors import MissingExtra
from paredown.pipeline import EmbedderSettings

if TYPE_CHECKING:
    from conftest import Fake

FACTS: dict[str, Any] = {
    "verb": "distill",
    "out": "small",
    "layers": [0, 2, 5],
    "figures": [
        {"metric": "cosine", "teacher": 1.0, "before": 0.6435, "after": 0.8912, "change": {"value": 0.2477}},
        {
            **{"metric": "spearman", "teacher": 0.8673, "before": 0.8197, "after": 0.8615},
            "change": {"value": 0.0418, "low": 0.0342, "high": 0.0495},
        },
    ],
    "timing": [
        {"name": "teacher", "texts_per_second": 300.0, "speedup": {"value": 1.0, "low": 1.0, "high": 1.0}},
        {"name": "student", "texts_per_second": 570.0, "speedup": {"value": 1.9, "low": 1.8, "high": 2.0}},
    ],
    "steps": 215,
    "improved": True,
    "parameters_before": 22_700_000,
    "parameters": 17_400_000,
}
SHARED: dict[str, Any] = {
    **{"eval": "t.csv", "text_column": "t", "pair_column": "p", "score_column": "s", "eval_text_column": "e"},
    **{"max_length": 99, "batch_size": 32, "learning_rate": 1e-4, "threads": 2, "seed": 7},
}


@pytest.fixture
def asked(fake: Fake) -> Fake:
    """The pipeline of the command line, with the two verbs."""
    pipeline = sys.modules["paredown.pipeline"]
    fake.facts = dict(FACTS)
    pipeline.__dict__.update(
        EmbedderSettings=EmbedderSettings,
        train_embedder=fake.verb("train", as_bundle=False),
        distill_embedder=fake.verb("distill", as_bundle=False),
    )
    return fake


def words(given: dict[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(
    ("verb", "own"),
    [
        ("train", {"negative_column": "n", "label_column": "l", "minimum_score": 3.5, "epochs": 2.0}),
        ("train", {"minutes": 1.5}),
        ("distill", {"layers": 3, "steps": 9}),
        ("distill", {"keep_layers": "0,2,5", "minutes": 2.0}),
    ],
)
def test_every_option_is_handed_on(verb: str, own: dict[str, Any], asked: Fake) -> None:
    given = {**SHARED, **own}
    assert main(["embedder", verb, "m", "--data", "d.csv", "--out", "o", *words(given)]) == 0
    ((called, (settings,), named),) = asked.calls
    assert called == verb and not named
    given |= {"keep_layers": (0, 2, 5)} if "keep_layers" in own else {}
    assert settings == EmbedderSettings("m", "d.csv", "o", **given)


def test_every_setting_is_an_option() -> None:
    from paredown.cli._app import command

    group = command().commands["embedder"].commands
    found = {p.name for one in group.values() for p in one.params} - {"json", "teacher"}
    assert found == {each.name for each in dataclasses.fields(EmbedderSettings)}
    defaults = {p.name: p.default for one in group.values() for p in one.params if not p.required}
    for each in dataclasses.fields(EmbedderSettings):
        if each.name in defaults:
            assert (defaults[each.name] or None) == (each.default or None), each.name


def test_the_figures_are_shown(asked: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embedder", "distill", "m", "--data", "d.csv", "--layers", "3", "--out", "small"]) == 0
    out = capsys.readouterr().out
    assert "+0.0418 [+0.0342 to +0.0495]" in out and "0.8673" in out
    assert "1.90× [1.80 to 2.00]" in out and "570" in out
    assert "layers 0, 2, 5; parameters 22.7 M → 17.4 M; 215 steps" in out
    assert out.rstrip().endswith("model: small")


def test_of_training_that_brought_nothing_it_is_said(asked: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    asked.facts |= {"verb": "train", "improved": False, "timing": None}
    assert main(["embedder", "train", "m", "--data", "d.csv", "--out", "small"]) == 0
    assert "training made it no better" in capsys.readouterr().out


def test_json_is_the_facts(asked: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embedder", "train", "m", "--data", "d.csv", "--out", "small", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == FACTS


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "3", "--keep-layers", "1"], "not both"),
        (["--keep-layers", "one"], "--keep-layers takes numbers such as 0,2,5, not 'one'"),
        (["--layers", "3", "--steps", "3", "--minutes", "1"], "in one way"),
        (["--layers", "3", "--learning-rate", "2"], "learning_rate is above 0 and below 1"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    more: list[str], said: str, asked: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embedder", "distill", "m", "--data", "d.csv", "--out", "o", *more]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ") and said in shown
    assert not asked.calls


def test_the_extra_is_named_and_a_stop_says_how_to_go_on(
    asked: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def act(_progress: Any) -> None:
        raise MissingExtra("sentence-transformers", "embedder")

    asked.act = act
    assert main(["embedder", "train", "m", "--data", "d.csv", "--out", "o"]) == 2
    assert 'pip install "paredown[embedder]"' in capsys.readouterr().err

    def stop(_progress: Any) -> None:
        raise KeyboardInterrupt

    asked.act = stop
    assert main(["embedder", "train", "m", "--data", "d.csv", "--out", "o"]) == 130
    assert "start the same command again and it goes on" in capsys.readouterr().err
