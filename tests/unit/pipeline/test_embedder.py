"""Small sentence encoders made for real by sentence-transformers, of tiny seeded models."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import BadData, ParedownError, UnsupportedModel
from paredown.models import load_model
from paredown.pipeline import EmbedderSettings, _embedder, distill_embedder, train_embedder
from paredown.pipeline._embedder import evenly_spread
from paredown.pipeline._examples import alike, divided, read
from paredown.pipeline._prepare import outputs_of
from paredown.recovery import Course, Lesson, fit_embedder
from paredown.recovery._embedder import by_label
from paredown.surgery import cut
from paredown.targets import huggingface
from paredown.tasks import tokenize
from paredown.types import Plan
from tests.contracts.families import save, tiny, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:sentence_transformers.*",
    "ignore::FutureWarning:sentence_transformers.*",
    "ignore::DeprecationWarning:datasets.*",
    "ignore::DeprecationWarning:multiprocess.*",
)

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "my", "card", "is", "lost", "pay", "bill", "the", "loan", "help", "want"]


def sentence_encoder(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A tiny encoder as sentence-transformers has it: mean pooling, embeddings of length 1."""
    model = tiny(family, "text-embedding", **changes)
    anatomy = describe(model, normalize=True)
    plan = Plan(anatomy.fingerprint, anatomy.identity())
    small = cut(model, anatomy, plan)
    return huggingface.export(small, tiny_tokenizer(family), folder, anatomy=anatomy, plan=plan, max_length=30)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, rng.integers(3, 9)))] = None
    return list(found)


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def labelled(path: Path, count: int = 20) -> Path:
    """The label is the word that is said twice."""
    rng = np.random.default_rng(0)
    rows: dict[str, str] = {}
    for word in WORDS[:12]:
        while sum(label == word for label in rows.values()) < count:
            rows[" ".join(rng.permutation([word, word, *rng.choice(WORDS[12:], 2)]))] = word
    return table(path, ["text", "category"], rows.items())


def pairs(path: Path, count: int = 120) -> Path:
    """Each text with the same words in another order: what a mean of embeddings can learn."""
    rng = np.random.default_rng(1)
    rows = [(text, " ".join(rng.permutation(text.split()))) for text in texts(count)]
    return table(path, ["anchor", "positive"], rows)


def settings(model: Path, data: Path, out: Path, **more: Any) -> EmbedderSettings:
    more = {"steps": 20, "batch_size": 16, "threads": 1, **more}
    return EmbedderSettings(str(model), str(data), str(out), **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_encoder(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that learns from pairs in a few steps."""
    return sentence_encoder(tmp_path_factory.mktemp("shallow") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "texts.csv", ["text"], [[text] for text in texts(200)])


@pytest.fixture(scope="module")
def distilled(deep: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("made") / "student"
    return out, distill_embedder(settings(deep, plain, out, layers=2, steps=60, learning_rate=3e-3))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the timing at the end, which starts two processes: one test has it."""
    monkeypatch.setattr(_embedder, "speed", lambda *_, **__: {})


# -------------------------------------------------------------------------------------------------------- distillation


def figure(facts: dict[str, Any], metric: str) -> dict[str, Any]:
    (row,) = (row for row in facts["figures"] if row["metric"] == metric)
    return row


def test_a_student_learns_its_teacher(distilled: tuple[Path, dict[str, Any]], deep: Path) -> None:
    out, facts = distilled
    cosine = figure(facts, "cosine")
    assert cosine["teacher"] == pytest.approx(1)
    assert cosine["after"] > cosine["before"] and cosine["change"]["low"] > 0
    assert facts["layers"] == [0, 3] and facts["improved"]
    assert facts["parameters"] < facts["parameters_before"]
    assert facts["speedup"]["low"] <= facts["speedup"]["value"] <= facts["speedup"]["high"]
    assert facts["rows"] == {"learnt": 160, "judged": 20, "tested": 20}
    kept, whole = load_model(out).model.state_dict(), load_model(deep).model.state_dict()
    for name in (name for name in whole if name.startswith("embeddings.")):
        assert torch.equal(kept[name], whole[name])  # the teacher's own tables
    assert json.loads((out / "embedder.json").read_text())["figures"] == facts["figures"]


def test_the_folder_is_what_load_model_and_sentence_transformers_open(
    distilled: tuple[Path, dict[str, Any]],
) -> None:
    from sentence_transformers import SentenceTransformer

    out, _ = distilled
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    loaded = load_model(out)
    assert (loaded.task, loaded.pooling, loaded.normalize, loaded.max_length) == ("text-embedding", "mean", True, 30)
    encoder = Encoder(loaded.model, describe(loaded.model, pooling="mean", normalize=True).layout)
    said = texts(20, seed=5)
    tokens = tokenize(loaded.tokenizer, said, max_length=loaded.max_length, input_names=encoder.input_names)
    ours = outputs_of(encoder, tokens)
    theirs = SentenceTransformer(str(out), device="cpu").encode(said)
    assert np.abs(ours - theirs).max() < 1e-5


def test_nothing_is_left_beside_the_folder(distilled: tuple[Path, dict[str, Any]]) -> None:
    out, _ = distilled
    assert [path.name for path in out.parent.iterdir()] == ["student"]


@pytest.mark.usefixtures("untimed")
def test_the_same_seed_gives_the_same_student(deep: Path, plain: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name in ("a", "b"):
        distill_embedder(settings(deep, plain, tmp_path / name, layers=2, steps=12))
    assert same(tmp_path / "a", tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("untimed")
def test_what_was_stopped_ends_as_if_it_had_not_been(deep: Path, plain: Path, tmp_path: Path) -> None:
    asked = {"layers": 2, "steps": 40, "learning_rate": 1e-3}
    distill_embedder(settings(deep, plain, tmp_path / "whole", **asked))

    class Impatient:
        def stage(self, name: str, total: float | None = None) -> None: ...

        def say(self, text: str) -> None:
            said.append(text)

        def advance(self, amount: float = 1, note: str = "") -> None:
            if note.startswith("step 23 "):
                signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        distill_embedder(settings(deep, plain, tmp_path / "parts", **asked), Impatient())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (tmp_path / "parts").exists()
    assert [p.name for p in (tmp_path / ".parts.work" / "training").glob("checkpoint-23")]
    facts = distill_embedder(settings(deep, plain, tmp_path / "parts", **asked), Impatient())
    assert any("Going on" in one for one in said)
    assert facts["steps"] == 40 and [one["step"] for one in facts["checks"]] == list(range(0, 41, 4))
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("untimed")
def test_a_training_that_harms_leaves_the_start(deep: Path, plain: Path, tmp_path: Path) -> None:
    facts = distill_embedder(settings(deep, plain, tmp_path / "out", layers=4, steps=10))  # nothing to gain
    assert not facts["improved"]
    assert figure(facts, "cosine")["after"] == pytest.approx(1, abs=1e-6)


@pytest.mark.usefixtures("untimed")
def test_scored_pairs_are_judged_by_spearman(deep: Path, tmp_path: Path) -> None:
    one, two = texts(160), texts(160, seed=2)
    rows = [("x", "y", "z", i, i % 6, a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    path = tmp_path / "sts.tsv"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    named = {"text_column": "6", "pair_column": "7", "score_column": "5"}
    facts = distill_embedder(settings(deep, path, tmp_path / "a", keep_layers=(0, 1), **named))
    assert facts["layers"] == [0, 1]
    assert {"teacher", "before", "after", "change", "below_teacher"} <= figure(facts, "spearman").keys()
    plain = table(tmp_path / "texts.csv", ["text"], [[text] for text in texts(100, seed=9)])
    named = {"eval": str(path), "eval_text_column": "6", "pair_column": "7", "score_column": "5"}
    facts = distill_embedder(settings(deep, plain, tmp_path / "b", layers=1, **named))
    assert facts["rows"]["tested"] == 160 and facts["layers"] == [3]
    assert figure(facts, "spearman")["teacher"] == pytest.approx(figure(facts, "spearman")["teacher"])


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "mpnet"])
@pytest.mark.usefixtures("untimed")
def test_every_family_can_be_a_teacher(family: str, plain: Path, tmp_path: Path) -> None:
    teacher = save(tiny(family, "text-embedding"), tmp_path / "teacher")  # a plain folder of transformers
    facts = distill_embedder(settings(teacher, plain, tmp_path / "out", layers=2, steps=30, learning_rate=3e-3))
    assert figure(facts, "cosine")["after"] > figure(facts, "cosine")["before"]
    assert load_model(tmp_path / "out").pooling == "mean"


@pytest.mark.parametrize(("depth", "count", "kept"), [(6, 3, (0, 2, 5)), (6, 6, (0, 1, 2, 3, 4, 5)), (12, 1, (11,))])
def test_layers_are_evenly_spread(depth: int, count: int, kept: tuple[int, ...]) -> None:
    assert evenly_spread(depth, count) == kept


# ------------------------------------------------------------------------------------------------------------ contrast


def test_labels_are_learnt(shallow: Path, tmp_path: Path) -> None:
    data = labelled(tmp_path / "data.csv")
    facts = train_embedder(settings(shallow, data, tmp_path / "out", steps=60, learning_rate=1e-2))
    assert figure(facts, "label_of_nearest")["change"]["low"] > 0
    assert facts["verb"] == "train" and facts["layers"] == [0] and "speedup" not in facts
    assert facts["rows"] == {"learnt": 192, "judged": 24, "tested": 24}
    assert not same(tmp_path / "out", shallow)


def test_pairs_are_learnt(shallow: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.csv", 200)
    facts = train_embedder(settings(shallow, data, tmp_path / "out", epochs=6, steps=None, learning_rate=1e-2))
    losses = [one["loss"] for one in facts["checks"]]
    assert losses[-1] < losses[0] / 2 and facts["improved"]
    assert facts["rows"]["learnt"] == 160 and facts["steps"] == 60  # 10 batches of 16 in every epoch
    assert figure(facts, "partner_nearest")["after"] > figure(facts, "partner_nearest")["before"]


def test_hard_negatives_are_learnt_from(shallow: Path, tmp_path: Path) -> None:
    rows = [(a, " ".join(reversed(a.split())), b) for a, b in zip(texts(100), texts(100, seed=7), strict=True)]
    with_them = table(tmp_path / "with.csv", ["anchor", "positive", "negative"], rows)
    without = table(tmp_path / "without.csv", ["anchor", "positive"], [row[:2] for row in rows])
    losses = []
    for data in (with_them, without):
        facts = train_embedder(settings(shallow, data, tmp_path / data.stem, steps=2))
        losses.append(facts["checks"][0]["loss"])
    assert losses[0] > losses[1]  # more texts to be told from


def test_minutes_become_steps(shallow: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.csv")
    facts = train_embedder(settings(shallow, data, tmp_path / "out", steps=None, minutes=0.01))
    assert facts["steps"] >= 1


def test_no_label_twice_in_a_batch() -> None:
    labels = np.repeat(np.arange(9), [3, 40, 5, 9, 8, 20, 7, 6, 2])
    found = list(by_label(labels, 6, 60, np.random.default_rng(0)))
    assert len(found) == 60
    for rows in found:
        assert len(set(labels[rows])) == len(rows) >= 3
    assert set(range(len(labels))) == {row for rows in found for row in rows}


def test_dropped_out_at_training_but_not_at_distilling(deep: Path, tmp_path: Path) -> None:
    """By what a step computes: the loss of the student itself, on its own embeddings, is nothing only without it."""
    said = texts(32)
    model = load_model(deep)
    encoder = Encoder(model.model, describe(model.model, pooling="mean", normalize=True).layout)
    tokens = tokenize(model.tokenizer, said, max_length=30, input_names=encoder.input_names)
    own = outputs_of(encoder, tokens)
    lesson = Lesson("distill", {"text": said, "label": own}, {"text": said, "label": own})
    best, checks = fit_embedder(deep, lesson, Course(1e-12, 16, steps=2), tmp_path / "work")
    assert checks[0].distance < 1e-10
    assert best == deep


# -------------------------------------------------------------------------------------------------------- the examples


def test_parts_share_no_text(tmp_path: Path) -> None:
    said = texts(60)
    rows = [(said[i % 60], said[(i * 7 + 1) % 60].upper() + " ") for i in range(300)]
    data = read(str(table(tmp_path / "pairs.csv", ["sentence1", "sentence2"], rows)), {})
    with pytest.raises(BadData, match="give more data"):  # each text is in ten pairs: nothing is left to learn from
        divided(data, None, path="pairs.csv", seed=0)
    plain = read(str(table(tmp_path / "texts.csv", ["text"], [[t] for t in (*said, *map(str.upper, said))])), {})
    parts = divided(plain, None, path="texts.csv", seed=0)
    keys = [set().union(*part.keys()) for part in (parts.learnt, parts.judged, parts.tested)]
    assert all(keys) and not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_labelled_parts_keep_two_texts_of_a_label(tmp_path: Path) -> None:
    data = read(str(labelled(tmp_path / "data.csv", 24)), {})
    parts = divided(data, None, path="data.csv", seed=0)
    for part in (parts.learnt, parts.judged, parts.tested):
        assert part.labels is not None
        assert (np.bincount(part.labels, minlength=12) >= 2).all()
    assert len(parts.learnt) + len(parts.judged) + len(parts.tested) == 288


def test_of_scored_pairs_those_that_mean_the_same_are_learnt(tmp_path: Path) -> None:
    rows = [(a, b, i % 6) for i, (a, b) in enumerate(zip(texts(60), texts(60, seed=3), strict=True))]
    data = read(str(table(tmp_path / "sts.csv", ["sentence1", "sentence2", "score"], rows)), {})
    assert data.scores is not None
    assert len(alike(data, "sts.csv", None)) == 20 and len(alike(data, "sts.csv", 5)) == 10
    with pytest.raises(BadData, match="no pair has a score of 6"):
        alike(data, "sts.csv", 6)


# -------------------------------------------------------------------------------------------------------- what is wrong


def bad(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], model: Path, **more: Any) -> str:
    with pytest.raises(BadData) as caught:
        train_embedder(settings(model, table(path, header, rows), path.parent / "out", **more))
    assert not (path.parent / "out").exists()
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    return str(caught.value)


def test_bad_data_is_one_sentence(deep: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    assert "nothing that belongs together" in bad(path, ["text"], [[t] for t in texts(50)], deep)
    assert "no column of texts" in bad(path, ["a", "b"], [["c", "d"]], deep)
    assert "no column 'other'" in bad(path, ["text", "b"], [["c", "d"]], deep, pair_column="other")
    assert "every row has an empty text" in bad(path, ["anchor", "positive"], [["c", " "]], deep)
    assert "no data row" in bad(path, ["anchor", "positive"], [], deep)
    assert "give more data" in bad(path, ["anchor", "positive"], [["a b", "b a"], ["c", "d"]], deep)
    assert "the same label" in bad(path, ["text", "label"], [[t, "x"] for t in texts(50)], deep)
    rows = [*([t, str(i % 2)] for i, t in enumerate(texts(50))), ["card bill", "alone"]]
    assert "'card bill' has one text only" in bad(path, ["text", "label"], rows, deep)
    rows = [["a", "b", "high"], ["c", "d", "1"]]
    assert "line 2: the score 'high'" in bad(path, ["sentence1", "sentence2", "score"], rows, deep)


def test_a_language_model_is_refused(plain: Path, tmp_path: Path) -> None:
    model = save(tiny("llama", "causal-lm"), tmp_path / "llama")
    with pytest.raises(UnsupportedModel, match="llama model, which does not do text-embedding"):
        distill_embedder(settings(model, plain, tmp_path / "out", layers=2))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layers": 5}, "The teacher has 4 layers"),
        ({"keep_layers": (0, 4)}, "the layers are 0 to 3"),
        ({"keep_layers": (1, 1)}, "each at most once"),
        ({"layers": 2, "keep_layers": (1,)}, "not both"),
        ({}, "how many layers the student has"),
        ({"layers": 2, "minutes": 1.0}, "in one way"),
        ({"layers": 2, "steps": None, "epochs": 0.0}, "epochs is a number above 0"),
    ],
)
def test_bad_settings_are_one_sentence(
    asked: dict[str, Any], said: str, deep: Path, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParedownError, match=said):
        distill_embedder(settings(deep, plain, tmp_path / "out", **asked))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_told_at_once(deep: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(BadData, match="not an empty folder"):
        distill_embedder(settings(deep, plain, tmp_path, layers=2))


def test_without_sentence_transformers_the_extra_is_named(plain: Path, deep: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['sentence_transformers'] = None; from paredown.cli import main\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'sentence_transformers' else find(name, *a)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "embedder", "distill", str(deep), "--data", str(plain), "--layers", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "paredown[embedder]"' in done.stderr and "Traceback" not in done.stderr
