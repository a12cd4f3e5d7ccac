"""Files of intents, as CLINC150 comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paredown.errors import BadData
from paredown.tasks import intent_parts, read_table, text_embedding
from paredown.tasks import text_classification as task

FILE = {
    "oos_train": [["who won", "oos"]],
    "train": [["my card is lost", "card"], ['say hi, "in" [french] {now}', "translate"], ["pay, please", "bill"]],
    "about": {"train": "not a list", "years": [2019]},
    "test": [["where is my card", "card"], ["a bill", "bill"]],
    "val": [],
}


def write(folder: Path, content: object, *, indent: int | None = 4) -> Path:
    path = folder / "intents.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_each_part_is_a_table_of_its_own(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path, FILE, indent=indent)
    train, test = read_table(path), read_table(path, part="test")
    assert [list(row) for row in train.rows] == FILE["train"]
    assert [list(row) for row in test.rows] == FILE["test"]
    assert intent_parts(path) == ("train", "test")
    lines = path.read_text().split("\n")
    for table in (train, test):
        assert all(
            row[0].split()[0] in "".join(lines[i - 1 : i + 1]) for row, i in zip(table.rows, table.lines, strict=True)
        )


def test_what_is_out_of_scope_is_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    data = task.load(path, labels={"bill": 0, "card": 1, "translate": 2})
    assert data.labels is not None and list(data.labels) == [1, 2, 0]
    assert "who won" not in data.texts
    assert data.notes == (f"{path}: the 3 texts of 'train' are read; 1 out-of-scope text of 'oos_train' left out.",)
    assert read_table(path, part="test").notes == (f"{path}: the 2 texts of 'test' are read.",)


def test_every_reader_takes_the_part_it_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    assert text_embedding.load(path, part="test").texts == ("where is my card", "a bill")
    known = {"bill": 0, "card": 1, "translate": 2}
    assert task.load(path, labels=known, part="test").texts == ("where is my card", "a bill")
    data, names = task.load_named(path)
    assert names == ("bill", "card", "translate")
    assert data.labels is not None and list(data.labels) == [1, 2, 0]


def test_other_json_files_have_no_parts(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n')
    assert intent_parts(path) == ()
    assert read_table(path).column("text") == ["a", "c"]
    (tmp_path / "a.csv").write_text("text\nb\n")
    assert intent_parts(tmp_path / "a.csv") == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": [["a", "b"], ["c"]]}, "line 7: expected a [text, intent] pair of two strings in 'train'"),
        ({"train": [["a", 3]]}, "line 3: expected a [text, intent] pair"),
        ({"train": ["ab"]}, "line 3: expected a [text, intent] pair"),
        ({"test": [["a", "b"]]}, "there is no 'train' among the parts of this file of intents; it has 'test'"),
        ({"train": []}, "no 'train' among the parts of this file of intents; it has none"),
        ({"texts": [["a", "b"]]}, "one JSON object without a list 'train'"),
        ('{\n "train": [\n  ["a", "b"],\n', "line 4: this is not JSON"),
        ('{"train": [["\\ud800", "b"]]}', "half a surrogate pair"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: Any, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(BadData) as error:
        read_table(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_labels_and_those_of_another_file(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,category\na,PIN\nb,card\nc,PIN\n")
    test.write_text("text,category\nd,Card\ne,PIN\n")
    data, names = task.load_named(train)
    assert names == ("PIN", "card")
    assert data.labels is not None and list(data.labels) == [0, 1, 0]
    other, same = task.load_named(test, known=names)
    assert same == names
    assert other.labels is not None and list(other.labels) == [1, 0]
    test.write_text("text,category\nd,Card\ne,loan\n")
    with pytest.raises(BadData, match=r"test.csv, line 3: no text to learn from has the label 'loan'"):
        task.load_named(test, known=names)
    test.write_text("text,category\nd,card\ne,card\n")
    with pytest.raises(BadData, match="all texts have the label 'card'; a classifier needs two classes or more"):
        task.load_named(test)
    test.write_text("text,category\nd,card\ne,\n")
    with pytest.raises(BadData, match="line 3: this row has no label"):
        task.load_named(test)
