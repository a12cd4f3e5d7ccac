from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from paredown.errors import BadData
from paredown.tasks import TextData, fit_tfidf
from paredown.tasks import text_classification as task

LABELS = {"Card": 0, "PIN": 1, "loan": 2}


def write(folder: Path, *rows: str) -> Path:
    path = folder / "data.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def labels_of(data: TextData) -> list[int]:
    assert data.labels is not None
    return [int(label) for label in data.labels]


def test_default_columns_labels_in_other_capitals_and_empty_texts(tmp_path: Path) -> None:
    data = task.load(write(tmp_path, "id,Category,text", "1,Card,a", "2,pin ,b", "3,loan, ", "4,LOAN,c"), labels=LABELS)
    assert data.texts == ("a", "b", "c")
    assert labels_of(data) == [0, 1, 2]
    assert len(data.notes) == 1 and "1 row with an empty text dropped" in data.notes[0]


def test_named_columns_and_a_file_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "text,what,kind", "a,b,Card", "c,d,PIN")
    data = task.load(path, text_column="what", label_column="kind", labels=LABELS)
    assert (data.texts, labels_of(data)) == (("b", "d"), [0, 1])
    data = task.load(write(tmp_path, "a,Card", "b,PIN"), text_column="1", label_column="2", labels=LABELS)
    assert (data.texts, labels_of(data)) == (("a", "b"), [0, 1])
    with pytest.raises(BadData, match="no column 'nothing'"):
        task.load(path, text_column="nothing", label_column="kind", labels=LABELS)


@pytest.mark.parametrize("known", [LABELS, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}])
def test_numbers_are_class_indices_when_no_name_matches(tmp_path: Path, known: dict[str, int]) -> None:
    data = task.load(write(tmp_path, "text,label", "a,2", "b,0.0"), labels=known)
    assert labels_of(data) == [2, 0]
    assert "class indices" in data.notes[0]
    with pytest.raises(BadData, match="line 3: the model does not know the label '3'"):
        task.load(write(tmp_path, "text,label", "a,2", "b,3"), labels=known)


def test_numbers_that_are_names_are_names(tmp_path: Path) -> None:
    data = task.load(write(tmp_path, "text,label", "a,5", "b,1"), labels={"1": 0, "5": 1})
    assert labels_of(data) == [1, 0]
    assert not data.notes


def test_a_name_that_two_labels_share_but_for_capitals_must_be_exact(tmp_path: Path) -> None:
    known = {"US": 0, "us": 1, "eu": 2}
    assert labels_of(task.load(write(tmp_path, "text,label", "a,us", "b,US"), labels=known)) == [1, 0]
    with pytest.raises(BadData, match="label 'Us'"):
        task.load(write(tmp_path, "text,label", "a,Us", "b,us"), labels=known)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ("text,label", "a,Card", "b,cards"),
            "line 3: the model does not know the label 'cards'; its 3 labels are 'Card'",
        ),
        (("text,label", "a,Card", "b,1"), "line 3: the model does not know the label '1'"),
        (("text,label", "a,Card", "b,"), "line 3: this row has no label"),
        (("text,label", "a,Card", "b,Card"), "all texts have the label 'Card'"),
        (("text,other", "a,Card"), "no column of labels found among 'text', 'other'"),
        (("other,label", "a,Card"), "no column of texts found among 'other', 'label'"),
        (("text,label", ",Card", " ,PIN"), "every row has an empty text"),
    ],
)
def test_bad_labels_get_one_sentence(tmp_path: Path, rows: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadData) as error:
        task.load(write(tmp_path, *rows), labels=LABELS)
    assert said in str(error.value)


def test_calibration_needs_no_labels_but_checks_those_it_has(tmp_path: Path) -> None:
    assert task.load(write(tmp_path, "text", "a"), labels=LABELS, require_labels=False).labels is None
    gaps = task.load(write(tmp_path, "text,label", "a,Card", "b,"), labels=LABELS, require_labels=False)
    assert gaps.labels is None and "1 row without a label" in gaps.notes[0]
    one_class = task.load(write(tmp_path, "text,label", "a,Card", "b,Card"), labels=LABELS, require_labels=False)
    assert labels_of(one_class) == [0, 0]
    with pytest.raises(BadData, match="label 'cards'"):
        task.load(write(tmp_path, "text,label", "a,cards"), labels=LABELS, require_labels=False)


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, size=200)  # classes 5 and 6 occur in the predictions alone, 7 nowhere
    logits = rng.normal(size=(200, 8))
    logits[:, 7] = -9
    logits[np.arange(200), labels] += 1
    data, predicted = TextData(("x",) * 200, labels), logits.argmax(1)
    found = task.metrics(logits, data)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert task.per_example(logits, data).tolist() == (labels == predicted).tolist()
    assert task.metric_name(data) == "accuracy" and task.all_texts(data) == data.texts


def test_logits_that_are_not_finite_are_wrong() -> None:
    data = TextData(("x", "y"), np.array([0, 0]))
    assert task.per_example(np.array([[np.nan, 0.0], [1.0, 0.0]]), data).tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------------- the control


def sentences(count: int, seed: int) -> TextData:
    rng = np.random.default_rng(seed)
    topics = (("card", "lost", "stolen"), ("pin", "forgot", "reset"), ("loan", "rate", "money"))
    labels = rng.integers(0, 3, size=count)
    filler = ("please", "i", "my", "the", "can", "you", "help")
    texts = (" ".join(rng.permutation([rng.choice(topics[c]), *rng.choice(filler, 4)])) for c in labels)
    return TextData(tuple(texts), labels)


@pytest.mark.parametrize("length", ["short", "long"])
def test_the_control_learns_and_unseen_classes_never_win(length: str) -> None:
    train, held_out = sentences(150, 0), sentences(60, 1)
    if length == "long":
        train = TextData(tuple(text + " so" * 200 for text in train.texts), train.labels)
    assert train.labels is not None
    train = TextData(train.texts, train.labels + 1)  # class 0 is not in the training data
    logits = fit_tfidf(train, num_classes=5).predict_logits(held_out.texts)
    assert logits.shape == (60, 5) and np.isfinite(logits).all()
    assert held_out.labels is not None
    assert (logits.argmax(1) == held_out.labels + 1).mean() > 0.9
    assert np.array_equal(logits, fit_tfidf(train, num_classes=5).predict_logits(held_out.texts))


def test_the_control_with_two_classes_and_with_one() -> None:
    data = sentences(150, 0)
    assert data.labels is not None
    two = data.take(np.flatnonzero(data.labels > 0))
    logits = fit_tfidf(two, num_classes=3).predict_logits(two.texts)
    assert two.labels is not None
    assert (logits.argmax(1) == two.labels).mean() > 0.95
    for useless in (data.take(np.flatnonzero(data.labels == 0)), TextData(data.texts)):
        with pytest.raises(BadData, match="two classes or more"):
            fit_tfidf(useless, num_classes=3)


def test_labels_that_no_model_knows_are_named_by_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "id,intent,text", "1,pay,a", "2,card,b", "3,pay,c", "4,loan, ", "5,7,d")
    data, names = task.load_named(path)
    assert names == ("7", "card", "pay")  # sorted; the row without a text counts for nothing
    assert (data.texts, labels_of(data)) == (("a", "b", "c", "d"), [2, 1, 2, 0])
    assert data.labels is not None and data.labels.dtype == np.int64
    assert len(data.notes) == 1 and "1 row with an empty text dropped" in data.notes[0]


def test_columns_of_labels_that_no_model_knows_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "text,what,label,kind", "a,b,x,Card", "c,d,y,PIN")
    data, names = task.load_named(path, text_column="what", label_column="kind")
    assert (data.texts, labels_of(data), names) == (("b", "d"), [0, 1], ("Card", "PIN"))


def test_a_second_file_takes_the_names_of_the_first(tmp_path: Path) -> None:
    known = ("card", "loan", "pay")
    data, names = task.load_named(write(tmp_path, "text,label", "a,Pay", "b,card ", "c,pay"), known=known)
    assert names is known and labels_of(data) == [2, 0, 2]
    with pytest.raises(BadData, match=r"data\.csv, line 3: no text to learn from has the label 'bill'"):
        task.load_named(write(tmp_path, "text,label", "a,pay", "b,bill"), known=known)
    with pytest.raises(BadData, match="label 'Us'"):  # two names differ from it by capitals alone
        task.load_named(write(tmp_path, "text,label", "a,us", "b,Us"), known=("US", "us"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("text,label", "a,x", "b,x"), "all texts have the label 'x'; a classifier needs two classes or more"),
        (("text,label", "a,x", "b,"), "line 3: this row has no label"),
        (("text,other", "a,x"), "no column of labels found among 'text', 'other'; name it with --label-column"),
        (("other,label", "a,x"), "no column of texts found"),
    ],
)
def test_what_no_classifier_can_learn_from_is_said(tmp_path: Path, rows: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadData, match=said) as caught:
        task.load_named(write(tmp_path, *rows))
    assert "data.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_whether_a_file_has_labels(tmp_path: Path) -> None:
    for name in task.LABEL_COLUMNS:
        assert task.has_labels(write(tmp_path, f"text,{name.upper()}", "a,x"))
    assert not task.has_labels(write(tmp_path, "text,kind", "a,x"))
    assert task.has_labels(write(tmp_path, "text,kind", "a,x"), "kind")
    assert not task.has_labels(write(tmp_path, "sentence1,sentence2,score", "a,b,1"))
    with pytest.raises(BadData, match=r"nowhere\.csv"):
        task.has_labels(tmp_path / "nowhere.csv")
