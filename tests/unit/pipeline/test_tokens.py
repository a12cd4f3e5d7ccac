"""Token policies tried side by side, and searched for several tasks, on tiny models; times are made up."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paredown.cli import main
from paredown.errors import BadData, ParedownError, UnsupportedModel
from paredown.pipeline import (
    SearchSettings,
    StudySettings,
    TokenSettings,
    _policies,
    _prepare,
    _token_search,
    _tokens,
    search_tokens,
    sweep_tokens,
)
from paredown.types import Array, TokenPolicy, TokenStage
from paredown.validation.timing import Alternative, Timing
from tests.contracts import families
from tests.unit.pipeline.conftest import Desk
from tests.unit.pipeline.test_fewshot import sentences, write

BOLD = TokenSettings(scorers=("norm",), after=(1,), keep=(0.4, 1.0), max_drop=0.9)


@pytest.fixture
def asked(desk: Desk) -> StudySettings:
    return StudySettings(str(desk.model), data=str(desk.train), eval=str(desk.test), threads=1)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny sentence encoder and two tasks for it."""
    folder = tmp_path_factory.mktemp("tokens")
    families.save(families.tiny("bert", "text-embedding"), folder / "model")
    for i, name in enumerate(("bills", "cards")):
        write(folder / f"{name}.csv", sentences(60, i))
    return folder


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Each alternative takes as long as is said here by its name, or a second; nothing is run."""
    seconds: dict[str, float] = {}

    def measure(
        alternatives: Sequence[Alternative], batches: Sequence[Mapping[str, Array]], *, progress: Any, **_: Any
    ) -> Any:
        progress(1, 1)
        texts = sum(len(next(iter(batch.values()))) for batch in batches)
        singles = np.ones((9, 1))
        return {
            one.name: Timing(one.name, np.full(9, seconds.get(one.name, 1.0)), singles, texts) for one in alternatives
        }

    monkeypatch.setattr(_tokens, "measure", measure)
    monkeypatch.setattr(_token_search, "measure", measure)
    monkeypatch.setattr(_policies, "_in_turn", lambda runners, batch: np.array([[1.0], [0.5]]))
    return seconds


# --------------------------------------------------------------------------------------------------------------- sweep


def test_the_fastest_that_passes_is_chosen_and_written(
    asked: StudySettings, untimed: dict[str, float], tmp_path: Path
) -> None:
    untimed |= {"norm, 40% after 1": 0.5, "norm, 100% after 1": 0.4, "norm, 70% after 1": 0.8}
    settings = TokenSettings(scorers=("norm",), after=(1,), keep=(0.4, 0.7, 1.0), max_drop=0.9)
    facts = sweep_tokens(asked, settings, out=tmp_path)
    rows = facts["candidates"]
    assert [row["name"] for row in rows] == [
        *("dense", "unpadded", "norm, 100% after 1", "norm, 70% after 1", "norm, 40% after 1")
    ]
    assert [row["chosen"] for row in rows] == [False, False, True, False, False]
    assert [row["speedup"]["value"] for row in rows] == pytest.approx([1, 1, 2.5, 1.25, 2])
    whole, half = rows[2], rows[4]
    assert whole["drop"]["value"] == 0 and half["drop"]["value"] > 0.02
    assert facts["accepted"] and "2.50 times" in facts["verdict"]
    written = TokenPolicy.from_json((tmp_path / "policy.json").read_text())
    assert written.stages == (TokenStage(1, 1.0),) and written.special_ids
    assert not (tmp_path / "policy.safetensors").exists()  # nothing was learnt


def test_only_guardrail_texts_are_run(asked: StudySettings, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[Any] = []
    outputs_of = _prepare.outputs_of
    monkeypatch.setattr(_tokens, "outputs_of", lambda model, tokens: run.append(tokens) or outputs_of(model, tokens))
    opened: list[Any] = []
    prepare = _prepare.prepare
    monkeypatch.setattr(_tokens, "prepare", lambda *a, **k: opened.append(prepare(*a, **k)) or opened[0])
    facts = sweep_tokens(asked, BOLD)
    test, guardrail = ({tuple(ids) for ids in part.ids} for part in (opened[0].test, opened[0].guardrail))
    seen = {tuple(ids) for tokens in run for ids in tokens.ids}
    assert seen == guardrail and not seen & test
    assert facts["samples"] == len(opened[0].splits.guardrail)
    assert len(run) == 3  # dense and two policies, once each


def test_nothing_is_written_where_none_passes(asked: StudySettings, tmp_path: Path) -> None:
    facts = sweep_tokens(asked, TokenSettings(("random",), (1,), (0.1,), max_drop=0.001), out=tmp_path / "out")
    assert not facts["accepted"] and facts["policy"] is None and "No policy passed" in facts["verdict"]
    assert not any(row["chosen"] for row in facts["candidates"])
    assert not (tmp_path / "out").exists()


def test_a_first_look_spares_texts(
    asked: StudySettings, untimed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopeless policies are judged on few texts, promising ones on all, from the fastest on until one passes."""
    monkeypatch.setattr(_tokens, "affordable", lambda tokens, owner: 50)
    run: list[int] = []
    outputs_of = _prepare.outputs_of
    monkeypatch.setattr(
        _tokens, "outputs_of", lambda model, tokens: run.append(len(tokens)) or outputs_of(model, tokens)
    )
    untimed |= {"random, 10% after 1": 0.1, "random, 100% after 1": 0.5, "random, 99% after 1": 0.7}
    facts = sweep_tokens(asked, TokenSettings(("random",), (1,), (0.1, 0.99, 1.0), max_drop=0.02))
    every = facts["samples"]
    assert every > 300 and run == [50, 50, 50, 50, every - 50, every - 50]  # the rest of dense, and of the one chosen
    assert [row["name"] for row in facts["candidates"] if row["chosen"]] == ["random, 100% after 1"]
    hopeless = facts["candidates"][-1]
    assert hopeless["name"] == "random, 10% after 1" and hopeless["passed"] is False
    chosen = next(row for row in facts["candidates"] if row["chosen"])
    assert (chosen["samples"], hopeless["samples"]) == (every, 50)
    # the dense model's figure is that on all texts, not on the few
    assert facts["quality_dense"] == pytest.approx(chosen["quality"] + chosen["drop"]["value"])


def test_one_policy_is_tried_as_it_was_written(asked: StudySettings, tmp_path: Path) -> None:
    facts = sweep_tokens(asked, TokenSettings(("learned",), (1,), (0.5,), max_drop=0.9), out=tmp_path)
    assert (tmp_path / "policy.safetensors").exists()
    before = sorted(path.name for path in tmp_path.iterdir())
    again = sweep_tokens(asked, TokenSettings(("norm",), (2,), (0.9,), max_drop=0.9), policy=tmp_path, out=tmp_path)
    assert again["policy"] == facts["policy"] and [row["name"] for row in again["candidates"]][2:] == [
        "learned, 50% after 1"
    ]
    assert again["candidates"][2]["quality"] == facts["candidates"][2]["quality"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (None, "", "holds no policy.json"),
        ("policy.json", "{", "cannot be read"),
        ("policy.json", '{"version": 9, "stages": []}', "cannot be read: token policy version 9"),
        (
            "policy.json",
            TokenPolicy("learned", (TokenStage(1, 0.5),)).to_json(),
            "lacks its tensor gate.1",
        ),
        ("policy.json", TokenPolicy("norm", (TokenStage(3, 0.5),)).to_json(), "cannot go after layer 3"),
    ],
)
def test_a_folder_without_a_proper_policy(
    asked: StudySettings, tmp_path: Path, name: str | None, text: str, said: str
) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ParedownError, match=said):
        sweep_tokens(asked, policy=tmp_path)


def test_texts_of_an_embedder_are_judged_by_a_classifier_where_they_have_labels(embedder: Path, tmp_path: Path) -> None:
    asked = StudySettings(str(embedder / "model"), data=str(embedder / "bills.csv"), threads=1)
    facts = sweep_tokens(asked, BOLD)
    assert facts["quality_metric"] == "accuracy" and facts["quality_dense"] > 0.5
    plain = tmp_path / "plain.csv"
    with plain.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text, _ in sentences(60, 0))])
    facts = sweep_tokens(StudySettings(asked.model, data=str(plain), threads=1), BOLD)
    assert facts["quality_metric"] == "cosine" and facts["quality_dense"] == pytest.approx(1)
    whole, half = (row["quality"] for row in facts["candidates"][2:])
    assert whole == pytest.approx(1, abs=1e-5) and half < 0.999


def test_graphs_are_timed_on_the_target(asked: StudySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    files: dict[str, bool] = {}
    measure = _tokens.measure

    def noting(alternatives: Sequence[Alternative], *a: Any, **k: Any) -> Any:
        files.update({one.name: Path(one.path).exists() and one.path.endswith(".onnx") for one in alternatives})
        return measure(alternatives, *a, **k)

    monkeypatch.setattr(_tokens, "measure", noting)
    facts = sweep_tokens(asked, TokenSettings(("norm",), (1,), (0.5,), target="onnxruntime", max_drop=0.9))
    assert files == {"dense": True, "norm, 50% after 1": True}
    assert facts["candidates"][1]["target"] == "onnxruntime"


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"scorers": ("guess",)}, "guess"),
        ({"scorers": ()}, "nothing to try"),
        ({"keep": (0.0,)}, "above 0 and at most 1"),
        ({"keep": (2.0,)}, "above 0 and at most 1"),
        ({"after": (0.0,)}, "share of the layers above 0"),
        ({"after": (1.5,)}, "or a number of them"),
        ({"target": "tpu"}, "no target 'tpu'"),
        ({"target": "onnxruntime", "precision": "bf16"}, "on torch only"),
        ({"precision": "int4"}, "not in 'int4'"),
    ],
)
def test_settings_that_make_no_sense(about: dict[str, Any], said: str) -> None:
    with pytest.raises(ParedownError, match=said):
        TokenSettings(**about)


def test_depths_are_shares_or_layers_or_several() -> None:
    settings = TokenSettings(("norm",), after=(0.33, 2, (4, 8), (0.33, 0.67), 0.99), keep=(0.7,))
    found = {tuple(stage.after for stage in policy.stages) for policy in settings.policies(12, [101])}
    assert found == {(4,), (2,), (4, 8), (11,)}


def test_a_language_model_is_refused(tale: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedModel, match="needs all of them"):
        sweep_tokens(StudySettings(str(tale[0]), data=str(tale[1]), threads=1), BOLD)


# ------------------------------------------------------------------------------------------------------------ policies


@pytest.mark.parametrize(
    ("ratios", "off"),
    [
        ([(8, 0.9), (16, 0.95), (32, 1.1), (64, 1.5)], 16),
        ([(8, 1.1), (16, 1.2)], 0),
        ([(8, 0.9), (16, 1.1), (32, 0.97), (64, 0.99), (128, 1.2)], 64),
        ([(8, 0.9), (16, 0.9)], 16),
        ([(8, 0.9), (16, 1.3), (32, 1.0), (64, 1.2), (128, 1.4)], 8),
        ([], 0),
    ],
)
def test_where_it_pays_is_found_among_noise(ratios: list[tuple[int, float]], off: int) -> None:
    assert _policies.pays_above(ratios) == off


def test_short_texts_keep_all_where_dropping_does_not_pay(
    asked: StudySettings, untimed: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    untimed["norm, 50% after 1"] = 0.5
    monkeypatch.setattr(
        _policies,
        "_in_turn",
        lambda runners, batch: np.array([[1.0], [1.0 if batch["input_ids"].shape[1] < 20 else 0.5]]),
    )
    facts = sweep_tokens(asked, TokenSettings(("norm",), (1,), (0.5,), max_drop=0.9), out=tmp_path)
    assert [row["length"] for row in facts["lengths"]] == [8, 12, 16, 24, 32]
    assert TokenPolicy.from_json((tmp_path / "policy.json").read_text()).off_below == 16
    assert "up to 16 tokens keep all" in facts["verdict"]


def test_a_run_tries_policies_on_long_texts_alone() -> None:
    def prepared(mean: float) -> Any:
        tokenizer = SimpleNamespace(cls_token_id=2, sep_token_id=3, bos_token_id=None, eos_token_id=3)
        lengths = np.array([mean])
        return SimpleNamespace(guardrail=SimpleNamespace(lengths=lengths), loaded=SimpleNamespace(tokenizer=tokenizer))

    long, short = prepared(100), prepared(_policies.WORTH_TRYING - 1)
    assert _policies.policies_for(short, 6, bold=True) == []
    assert _policies.policies_for(long, 1, bold=True) == []
    careful, bold = _policies.policies_for(long, 6, bold=True)
    assert _policies.policies_for(long, 6, bold=False) == [careful]
    assert careful.stages == (TokenStage(2, 0.7),) and bold.stages == (TokenStage(1, 0.5),)
    assert careful.special_ids == (2, 3)
    mine = TokenPolicy("norm", (TokenStage(2, 0.5),))
    assert _policies.policies_for(short, 6, bold=True, asked=mine) == [mine]
    assert _policies.policies_for(long, 2, bold=True, asked=mine) == []  # no layer is left behind it


def test_policies_in_words() -> None:
    stages = (TokenStage(1, 0.7), TokenStage(3, 0.5))
    assert _policies.described(TokenPolicy("cls_attention", stages)) == "cls attention, 70% after 1 and 50% after 3"
    quantile = TokenPolicy("attention", stages[:1], rule="quantile", least=15)
    assert _policies.described(quantile) == "attention, above the 0.7-quantile after 1, 15 at least"
    assert _policies.described(TokenPolicy("norm", stages[:1], action="merge")) == "merged, 70% after 1"


# -------------------------------------------------------------------------------------------------------------- search


def looked(embedder: Path, settings: SearchSettings, **about: Any) -> dict[str, Any]:
    tasks = [str(embedder / f"{name}.csv") for name in ("bills", "cards")]
    return search_tokens(str(embedder / "model"), tasks, settings, threads=1, **about)


def test_one_threshold_for_two_tasks(embedder: Path, tmp_path: Path) -> None:
    settings = SearchSettings((3, 6), (0.2, 0.5), (1, 2), max_drop=0.9, shots=5, seeds=2)
    facts = looked(embedder, settings, out=tmp_path)
    assert facts["accepted"] and facts["chosen"] == {"s": 3, "q": 0.5, "l": 1}  # the cheapest: all pass
    assert [row["task"] for row in facts["tasks"]] == ["bills", "cards"]
    assert [row["policy"] for row in facts["left_out"]] == [facts["chosen"]] * 2
    assert facts["published"] == {"s": 15, "q": 0.8, "l": 1} and "drop" in facts["tasks"][0]["published"]
    for row in facts["tasks"]:
        assert row["drop"]["value"] == pytest.approx(row["dense"]["value"] - row["pruned"]["value"])
        assert row["time"]["value"] == 1.0 and 0 < row["longer_than_s"] <= 1 and row["dense"]["value"] > 0.45
    assert TokenPolicy.from_json((tmp_path / "policy.json").read_text()).least == 3


def test_texts_that_choose_are_not_those_that_are_reported(embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[tuple[int, int]]] = {"lost": [], "told": []}
    for name in asked:
        real = getattr(_token_search._Search, f"_{name}")

        def noting(self: Any, i: int, *rest: Any, _name: str = name, _real: Any = real) -> Any:
            part = self.tasks[i].chosen_by if _name == "lost" else self.tasks[i].reported
            asked[_name].append((i, *part.indices(len(self.tasks[i].tested))[:2]))
            return _real(self, i, *rest)

        monkeypatch.setattr(_token_search._Search, f"_{name}", noting)
    looked(embedder, SearchSettings((3,), (0.5,), (1,), max_drop=0.9, shots=5, seeds=1))
    assert {stop for _, start, stop in asked["lost"]} == {start for _, start, stop in asked["told"]}


def test_where_none_is_good_enough_the_closest_is_reported(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = {(2, 0.9, 1): 0.3, (2, 0.2, 1): 0.05}
    monkeypatch.setattr(_token_search._Search, "_lost", lambda self, i, one, fold: np.full(4, drops[one]))
    facts = looked(embedder, SearchSettings((2,), (0.2, 0.9), (1,), max_drop=0.01, shots=5, seeds=1), out=tmp_path)
    assert not facts["accepted"] and facts["policy"] is None
    assert facts["chosen"] == {"s": 2, "q": 0.2, "l": 1}
    assert "No policy of the grid stays within 1.0%" in facts["verdict"] and "5.00 points" in facts["verdict"]
    assert [row["policy"] for row in facts["left_out"]] == [None, None]
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize(("scatter", "accepted"), [(0.0, True), (0.2, False)])
def test_a_drop_that_may_be_luck_does_not_choose(
    embedder: Path, monkeypatch: pytest.MonkeyPatch, scatter: float, accepted: bool
) -> None:
    lost = 0.005 + scatter * np.array([-1.0, 1.0] * 50)  # a standard error of 0.02
    monkeypatch.setattr(_token_search._Search, "_lost", lambda self, i, one, fold: lost)
    facts = looked(embedder, SearchSettings((3,), (0.5,), (1,), max_drop=0.01, shots=5, seeds=1))
    assert facts["accepted"] is accepted


def test_what_fails_rules_out_what_drops_more(embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, float, int]] = []
    monkeypatch.setattr(
        _token_search._Search, "_bound", lambda self, i, one, fold: tried.append(one) or float(one[1] > 0.3)
    )
    facts = looked(embedder, SearchSettings((3,), (0.3, 0.5, 0.7), (1,), max_drop=0.01, shots=5, seeds=1))
    assert facts["chosen"]["q"] == 0.3
    assert tried.index((3, 0.7, 1)) < tried.index((3, 0.5, 1)) < tried.index((3, 0.3, 1))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"least": ()}, "grid is empty"),
        ({"least": (0,)}, "1 or more"),
        ({"quantile": (1.0,)}, "between 0 and 1"),
        ({"scorer": "guess"}, "guess"),
        ({"shots": 0}, "shots and seeds"),
    ],
)
def test_searches_that_make_no_sense(about: dict[str, Any], said: str) -> None:
    with pytest.raises(ParedownError, match=said):
        SearchSettings(**about)


def test_a_search_needs_two_tasks_enough_texts_and_layers(embedder: Path) -> None:
    with pytest.raises(ParedownError, match="two tasks at least"):
        search_tokens(str(embedder / "model"), [str(embedder / "bills.csv")])
    with pytest.raises(BadData, match="50 shots were asked for"):
        looked(embedder, SearchSettings(shots=50))
    with pytest.raises(ParedownError, match="after 1 to 2 of them"):
        looked(embedder, SearchSettings(after=(7,), shots=5))


# -------------------------------------------------------------------------------------------------------- the commands


def test_the_commands_print_and_leave_pages(
    desk: Desk, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sweep = ["tokens", "sweep", str(desk.model), "--data", str(desk.train), "--eval", str(desk.test), "--threads", "1"]
    grid = ["--scorers", "norm", "--keep", "0.5", "--after", "1,1+2", "--max-drop", "90%"]
    assert main([*sweep, *grid, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in facts["candidates"]]
    assert names[2:] == ["norm, 50% after 1 and 50% after 2", "norm, 50% after 1"]
    page = (out / "sweep.html").read_text()
    assert "norm, 50% after 1 and 50% after 2" in page and "<svg" in page
    assert len((out / "sweep.jsonl").read_text().splitlines()) == 1 + len(names)
    assert main([*sweep, *grid]) == 0
    assert "norm, 50% after 1" in capsys.readouterr().out
    search = ["tokens", "search", str(embedder / "model"), "--threads", "1", "--shots", "5", "--seeds", "1"]
    search += ["--tasks", f"{embedder / 'bills.csv'},{embedder / 'cards.csv'}", "--max-drop", "90%"]
    assert main([*search, "--s", "3", "--q", "0.5", "--l", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Chosen by the other tasks" in said and "3, 0.5, 1" in said and "100% [100%, 100%]" in said
    assert "3, 0.5, 1" in (out / "search.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "none"], "'none' is not a share"),
        (["--scorers", "guess"], "guess"),
        (["--keep", "150%"], "above 0 and at most 1"),
        (["--after", "0"], "A depth is"),
        (["--policy", "nowhere"], "holds no policy.json"),
    ],
)
def test_what_the_commands_refuse(
    desk: Desk, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["tokens", "sweep", str(desk.model), "--data", str(desk.train), *options]) == 2
    assert said in capsys.readouterr().err
