"""Few-shot intents on tiny models: what is drawn, learnt, compared and timed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import paredown
from paredown.bundle import save
from paredown.errors import BadData, ParedownError, UnsupportedModel
from paredown.models import load_model
from paredown.pipeline import _fewshot, _loaders, fewshot
from paredown.pipeline._embedders import Embedder, open_embedder
from paredown.tasks import draw_shots, pool_and_test, text_classification
from paredown.types import Array
from paredown.validation.timing import Alternative, Timing
from tests.contracts import bundles, families

WORDS = {"bill": "pay bill the w3 w4", "card": "card lost my w1 w2", "loan": "loan new want w5 w6"}


def sentences(per_label: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    words = {label: own.split() for label, own in WORDS.items()}
    return [
        (" ".join([*rng.choice(own, rng.integers(3, 7)), f"x{seed}", "abcdefghij"[i % 10], str(i // 10)]), label)
        for label, own in words.items()
        for i in range(per_label)
    ]


def write(path: Path, rows: Sequence[tuple[str, str]], header: Sequence[str] = ("text", "category")) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense` and `slim` (its bundle), a `classifier` with its bundle, a `stranger`, and data."""
    folder = tmp_path_factory.mktemp("fewshot")
    dense = folder / "dense"
    families.save(families.tiny("bert", "text-embedding"), dense)
    loaded = load_model(dense)
    model, anatomy, plan, folds = bundles.pruned(loaded)
    about: dict[str, Any] = {"plan": plan, "loaded": loaded, "accepted": True, "folds": folds}
    save(folder / "slim", model=model, anatomy=anatomy, target="torch", report={"model": str(dense)}, **about)
    bundles.make(folder / "slim-classifier", work=folder / "work")
    (folder / "work" / "dense").rename(folder / "classifier")
    families.save(families.tiny("roberta", "text-embedding"), folder / "stranger")
    write(folder / "train.csv", sentences(40, 0))
    write(folder / "test.csv", sentences(15, 1))
    return folder


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is timed: what would be is noted, with its loader."""
    noted: list[str] = []

    def measure(alternatives: Sequence[Alternative], batches: Sequence[Mapping[str, Array]], **_: Any) -> Any:
        noted.extend(f"{one.name}: {one.options['loader'].rpartition('.')[2]}" for one in alternatives)
        texts = sum(len(next(iter(batch.values()))) for batch in batches)
        taken = np.linspace(1.0, 2.0, len(alternatives))
        none = np.zeros((9, 0))
        return {
            one.name: Timing(one.name, np.full(9, seconds), none, texts)
            for one, seconds in zip(alternatives, taken, strict=True)
        }

    monkeypatch.setattr(_fewshot, "measure", measure)
    return noted


def run(place: Path, *models: str, **changes: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"data": str(place / "train.csv"), "eval": str(place / "test.csv"), "threads": 1}
    about |= {"shots": (1, 5), "seeds": 3, **changes}
    first, *others = (str(place / name) for name in models)
    return fewshot(first, against=others, **about)


# ------------------------------------------------------------------------------------------------------- what is found


def test_every_figure_is_that_of_a_regression_done_by_hand(place: Path, untimed: list[str]) -> None:
    facts = run(place, "dense", "slim", seeds=2, seed=5)
    pool, names = text_classification.load_named(place / "train.csv")
    test, _ = text_classification.load_named(place / "test.csv", known=names)
    pool, test, _ = pool_and_test(pool, test, seed=5)
    assert pool.labels is not None and test.labels is not None
    embed = {"dense": stock_mean(load_model(place / "dense").model), "slim": paredown.load(place / "slim").predict}
    for row in facts["rows"]:
        found = []
        for i in range(2):
            drawn = draw_shots(pool.labels, 3, 5, seed=(5, i))[:, : row["shots"]].ravel()
            rows = [embed[row["model"]](list(part.texts)) for part in (pool.take(drawn), test)]
            rows = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
            classifier = LogisticRegression(C=10, max_iter=300).fit(rows[0], pool.labels[drawn])
            found.append((classifier.predict(rows[1]) == test.labels).mean())
        assert row["accuracy"]["value"] == pytest.approx(np.mean(found), abs=0.5 / 45)
    assert untimed == ["dense: _loaders:embedder", "slim: _loaders:embedder"]


def stock_mean(model: Any) -> Any:
    """Embeddings by transformers' own forward pass, text by text."""

    def embed(texts: Sequence[str]) -> Array:
        tokenizer = families.tiny_tokenizer(model.config.model_type)
        with torch.no_grad():
            found = [model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        return torch.stack(found).numpy()

    return embed


def test_the_facts_are_whole(place: Path, untimed: list[str]) -> None:
    facts = run(place, "dense", "slim")
    assert [(row["shots"], row["model"]) for row in facts["rows"]] == [
        (k, name) for k in (1, 5) for name in ("dense", "slim")
    ]
    values: dict[tuple[int, str], dict[str, float]] = {}
    for row in facts["rows"]:
        for metric in ("accuracy", "weighted_f1"):
            found = row[metric]
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
            values.setdefault((row["shots"], metric), {})[row["model"]] = found["value"]
    for row in facts["rows"]:
        assert (row["difference"] is None) == (row["model"] == "dense")
        for metric, apart in (row["difference"] or {}).items():
            both = values[row["shots"], metric]
            assert apart["value"] == pytest.approx(both["slim"] - both["dense"])
            assert apart["low"] <= apart["value"] <= apart["high"]
    assert [(one["name"], one["kind"], one["width"]) for one in facts["models"]] == [
        ("dense", "dense", 24),
        ("slim", "bundle", 24),
    ]
    assert facts["models"][0]["parameters"] > facts["models"][1]["parameters"]
    assert (facts["classes"], facts["pool"], facts["samples"], facts["seeds"]) == (3, 120, 45, 3)
    assert facts["timing"]["against"] == "dense" and facts["timing"]["rows"][0]["speedup"] is None
    assert facts["timing"]["rows"][1]["speedup"]["value"] == 0.5
    json.dumps(facts, allow_nan=False)


def test_more_shots_teach_more_and_the_seed_decides(place: Path, untimed: list[str]) -> None:
    facts = run(place, "dense", shots=(10, 1), seeds=5)
    few, many = (row["accuracy"]["value"] for row in facts["rows"])
    assert facts["shots"] == [1, 10] and many > few > 1 / 3
    assert run(place, "dense", shots=(10, 1), seeds=5)["rows"] == facts["rows"]
    assert run(place, "dense", shots=(10, 1), seeds=5, seed=1)["rows"] != facts["rows"]


def test_a_model_against_itself_differs_by_nothing(place: Path, untimed: list[str]) -> None:
    facts = run(place, "dense", "dense")
    assert [one["name"] for one in facts["models"]] == ["dense", "dense (2)"]
    apart = [row["difference"] for row in facts["rows"] if row["difference"]]
    assert apart == [{m: {"value": 0.0, "low": 0.0, "high": 0.0} for m in ("accuracy", "weighted_f1")}] * 2


def test_a_text_is_embedded_once_and_only_if_it_is_used(
    place: Path, untimed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []
    plain = Embedder.embed

    def embed(self: Embedder, tokens: Any, advance: Any) -> Array:
        seen.append(len(tokens))
        return plain(self, tokens, advance)

    monkeypatch.setattr(Embedder, "embed", embed)
    rows = sentences(15, 1)
    run(place, "dense", shots=(2,), seeds=1, eval=write(tmp_path / "twice.csv", rows + rows))
    assert seen == [45 + 6]


# ---------------------------------------------------------------------------------------------------- what may be given


def test_a_bundle_alone_is_compared_with_the_model_that_it_was_made_from(
    place: Path, untimed: list[str], tmp_path: Path
) -> None:
    facts = run(place, "slim")
    assert [one["name"] for one in facts["models"]] == ["dense", "slim"]
    assert facts["rows"] == run(place, "dense", "slim")["rows"]
    facts = run(place, "slim-classifier")
    assert [one["name"] for one in facts["models"]] == ["slim-classifier"]
    assert "slim-classifier is not compared with its dense model: its report names none" in facts["notes"][0]


def test_a_classifier_gives_the_mean_of_its_tokens(place: Path, untimed: list[str]) -> None:
    facts = run(place, "classifier", "slim-classifier", shots=(1,), seeds=1)
    assert [one["pooling"] for one in facts["models"]] == ["mean", "mean"]
    assert sum("is a classifier" in note for note in facts["notes"]) == 2
    texts = [text for text, _ in sentences(3, 2)]
    wanted = stock_mean(load_model(place / "classifier").model.base_model)(texts)
    np.testing.assert_allclose(embedded_by(place / "classifier", texts), wanted, atol=1e-5)
    small: Any = paredown.load(place / "slim-classifier").network()
    for text, found in zip(texts, embedded_by(place / "slim-classifier", texts), strict=True):
        ids = families.tiny_tokenizer("bert")([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            x = small.embed(ids, torch.zeros_like(ids))
            for layer in small.layers:
                x = layer.feed(layer.attend(x, small.mask(x, torch.ones_like(ids))))
        np.testing.assert_allclose(found, x[0].mean(0), atol=1e-5)


def embedded_by(path: Path, texts: Sequence[str]) -> Array:
    embedder = open_embedder(str(path), threads=torch.get_num_threads())
    return embedder.embed(embedder.tokens(texts), lambda count: None)


def test_clincs_own_file_has_its_own_test_part(place: Path, untimed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "data_full.json"
    parts: dict[str, Any] = {"train": sentences(12, 0), "val": sentences(2, 3), "test": sentences(7, 1)}
    path.write_text(json.dumps({**parts, "oos_train": [["who", "oos"]], "oos_test": [["why", "oos"], ["wo", "oos"]]}))
    facts = run(place, "dense", data=str(path), eval=None)
    assert (facts["pool"], facts["samples"], facts["classes"]) == (36, 21, 3)
    assert "1 out-of-scope text of 'oos_train' left out" in facts["notes"][0]
    assert "2 out-of-scope texts of 'oos_test' left out" in facts["notes"][1]
    path.write_text(json.dumps({"train": parts["train"]}))
    facts = run(place, "dense", data=str(path), eval=None)
    assert facts["pool"] + facts["samples"] == 36


def test_without_a_test_file_a_part_is_set_aside(place: Path, untimed: list[str]) -> None:
    facts = run(place, "dense", eval=None)
    assert (facts["pool"], facts["samples"]) == (72, 48)


def test_the_caller_keeps_his_threads(place: Path, untimed: list[str]) -> None:
    before = torch.get_num_threads()
    run(place, "dense", shots=(1,), seeds=1, threads=1)
    assert torch.get_num_threads() == before


# -------------------------------------------------------------------------------------------------------------- timing


def test_models_with_other_vocabularies_are_timed_on_the_same_texts(place: Path) -> None:
    """For real, in processes of their own."""
    facts = run(place, "dense", "slim", "stranger", shots=(1,), seeds=1)
    rows = facts["timing"]["rows"]
    assert [row["name"] for row in rows] == ["dense", "slim", "stranger"]
    assert all(row["texts_per_second"] > 0 for row in rows)
    assert all(row["speedup"]["low"] <= row["speedup"]["value"] <= row["speedup"]["high"] for row in rows[1:])


def test_each_model_has_its_own_arrays_of_the_same_texts(place: Path) -> None:
    texts = [text for text, _ in sentences(10, 0)]
    sides = [open_embedder(str(place / name), threads=1) for name in ("dense", "slim", "stranger")]
    tokens = [side.tokens(texts) for side in sides]
    suffixes = _fewshot._suffixes(tokens)
    assert suffixes == [".0", ".0", ".1"]
    batches = _fewshot._timing_batches(tokens, suffixes)
    assert {len(array) for array in batches[0].values()} == {30}
    wanted = sides[2].embed(tokens[2], lambda count: None)
    loaded = _loaders.with_own_inputs(
        str(place / "stranger"), threads=torch.get_num_threads(), loader=_loaders.EMBEDDER, suffix=".1"
    )
    found = loaded.run(batches[0])["embeddings"]
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(wanted, axis=0), atol=1e-5)


def test_a_dense_model_is_timed_where_a_bundle_serves(place: Path, untimed: list[str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    bundles.make(tmp_path / "served", task="text-embedding", exported=["onnxruntime"], target="onnxruntime", work=work)
    facts = run(place, str(work / "dense"), str(tmp_path / "served"), shots=(1,), seeds=1)
    assert untimed == [
        "dense, onnxruntime: onnxruntime:load",
        "dense, torch: _loaders:embedder",
        "served: _loaders:embedder",
    ]
    assert facts["timing"]["against"] == "dense, onnxruntime"  # its fastest


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"shots": (1, 41)},
            "41 shots were asked for, but the label 'bill' has 40 texts to draw from; 2 other labels",
        ),
        ({"shots": (25,), "eval": None}, "has 24 texts to draw from once 40 % are set aside to test on"),
        ({"shots": ()}, "Shots are whole numbers"),
        ({"shots": (1, 0)}, "Shots are whole numbers of 1 or more, such as 1, 2, 5; not 0"),
        ({"shots": (2.5,)}, "not 2.5"),
        ({"seeds": 0}, "seeds is a number of draws"),
        ({"max_length": 3}, "max_length is 4 tokens or more"),
        ({"text_column": "words"}, "no column 'words'; the columns are 'text', 'category'"),
        ({"label_column": "what"}, "no column 'what'"),
        ({"data": "nowhere.csv"}, "nowhere.csv: there is no such file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    place: Path, untimed: list[str], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ParedownError) as error:
        run(place, "dense", **changes)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert untimed == []


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([("a", "x"), ("b", "x")], ("text", "category"), "all texts have the label 'x'; a classifier needs two"),
        ([("a", "x"), ("b", "")], ("text", "category"), "line 3: this row has no label"),
        ([("a", "x"), ("b", "y")], ("text", "other"), "no column of labels found among 'text', 'other'"),
        ([("a", "x"), ("b", "y")], ("other", "label"), "no column of texts found"),
        ([], ("text", "label"), "there is a header but no data row"),
    ],
)
def test_data_that_is_wrong(
    place: Path, tmp_path: Path, rows: list[tuple[str, str]], header: tuple[str, str], said: str
) -> None:
    with pytest.raises(BadData, match=said):
        run(place, "dense", data=write(tmp_path / "bad.csv", rows, header))


def test_a_label_that_only_the_test_file_has(place: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "more.csv", [*sentences(4, 1), ("my fees", "fees")])
    with pytest.raises(BadData, match=r"more.csv, line 14: no text to learn from has the label 'fees'"):
        run(place, "dense", eval=path)


def test_a_language_model_and_a_folder_without_one(place: Path, tmp_path: Path) -> None:
    families.save(families.tiny("llama"), tmp_path / "llama")
    with pytest.raises(UnsupportedModel, match="is a language model; sentence embeddings come from a text encoder"):
        run(place, str(tmp_path / "llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModel, match="holds no config.json"):
        run(place, "dense", str(tmp_path / "empty"))


def test_embeddings_that_are_no_numbers(place: Path, untimed: list[str], tmp_path: Path) -> None:
    model = families.tiny("bert", "text-embedding")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    families.save(model, tmp_path / "broken")
    with pytest.raises(ParedownError, match="gives embeddings that are not finite numbers"):
        run(place, str(tmp_path / "broken"))


def test_names_tell_models_apart() -> None:
    assert _fewshot._names(["a/model", "b/model/"]) == ["a/model", "b/model"]
    assert _fewshot._names(["x/dense", "slim/"]) == ["dense", "slim"]
    assert _fewshot._names(["package/model", "/x/slim"]) == ["package/model", "slim"]
    assert _fewshot._names(["m", "m", "m"]) == ["m", "m (2)", "m (3)"]
    assert _fewshot._names([".", "/"]) == [Path.cwd().name, "/"]


def test_the_verb_is_public() -> None:
    assert paredown.fewshot is fewshot
