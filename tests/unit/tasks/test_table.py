from __future__ import annotations

import csv
from pathlib import Path

import pytest

from paredown.errors import BadData
from paredown.tasks import read_table


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_with_quotes_line_breaks_blank_lines_and_a_bom(tmp_path: Path) -> None:
    text = 'text, label\r\n"one, ""two""\nthree",a\r\n\r\nfour\u2028five,b\r\n'
    table = read_table(write(tmp_path, "a.csv", b"\xef\xbb\xbf" + text.encode()))
    assert table.columns == ("text", "label")
    assert table.column("text") == ['one, "two"\nthree', "four\u2028five"]
    assert table.column("label") == ["a", "b"]
    assert table.lines == (2, 5)


def test_a_cell_may_be_a_whole_document_and_the_limit_of_csv_is_put_back(tmp_path: Path) -> None:
    usual = csv.field_size_limit()
    table = read_table(write(tmp_path, "a.csv", "text\n" + "x" * (usual + 1)))
    assert len(table.column("text")[0]) == usual + 1
    assert csv.field_size_limit() == usual


def test_tsv_takes_bare_quotes_as_they_are(tmp_path: Path) -> None:
    # Read as CSV, the second row's mark would swallow the third row.
    table = read_table(write(tmp_path, "a.tsv", 'id\ttext\n1\t"Go\n2\the said "no"\n3\t"whole ""cell"""\n'))
    assert table.column("text") == ['"Go', 'he said "no"', 'whole "cell"']


def test_tsv_takes_csv_quoting_where_a_cell_has_a_line_break(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.tsv", 'id\ttext\n1\t"two\nlines"\n2\tone\n'))
    assert table.column("text") == ["two\nlines", "one"]


def test_a_file_without_a_header_takes_numbers_and_longer_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "sts.tsv", "a\t5.0\tone\ttwo\na\t1.5\tthree\tfour\tsource\tsource\n")
    table = read_table(path, wanted=("3", None, "2"))
    assert table.column("3") == ["one", "three"]
    assert table.column("2") == ["5.0", "1.5"]
    assert "without a header" in table.notes[0]
    with pytest.raises(BadData, match="line 1: this row has no '5'"):
        table.column("5")


def test_a_header_may_hold_numbers(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "1,2\nx,y\n"), wanted=("2",))
    assert table.column("2") == ["y"]
    assert not table.notes


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    content = '{"text": "a\\nb", "label": 3}\n\n{"label": true, "text": null, "more": 1.5}\n'
    table = read_table(write(tmp_path, f"a.{suffix}", content))
    assert table.column("text") == ["a\nb", ""]
    assert table.column("label") == ["3", "true"]
    assert table.lines == (1, 3)
    with pytest.raises(BadData, match="line 1: this row has no 'more'"):
        table.column("more")


def test_first_of_goes_by_the_order_asked_and_ignores_capitals(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "Content,TEXT\nx,y\n"))
    assert table.first_of(["text", "content"]) == "TEXT"
    assert table.first_of(["nothing"]) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", b"\xef\xbb\xbf \n", "the file is empty"),
        ("a.csv", "text,label\n", "no data row"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.csv", "text,label\na,b\nc\n", "line 3: this row has 1 cell where the header has 2"),
        ("a.csv", 'text,label\n"a\nb",c\n"d,e\nf,g\n', "line 4: the quotes"),
        ("a.tsv", "text\tlabel\na\tb\nc\td\te\n", "line 3: this row has 3 cells where the header has 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: this is not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2: expected a JSON object"),
        ("a.jsonl", "[" * 100_000, "one JSON list"),
        ("a.jsonl", '{"a":' + "[" * 200_000, "line 1: this is not a JSON object on one line"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: 'text' holds half a surrogate pair"),
        ("a.json", '[{"text": "a"}]', "one JSON list"),
        ("a.parquet", "x", "must end in .csv"),
        ("a", "x", "must end in .csv"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(BadData) as error:
        read_table(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadData, match="this is a folder"):
        read_table(tmp_path / "folder.csv")


def test_a_missing_column_is_named_beside_those_present(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "one,two,two\nx,y,z\n"))
    with pytest.raises(BadData, match="no column 'text'; the columns are 'one', 'two', 'two'"):
        table.column("text")
    with pytest.raises(BadData, match="more than one column 'two'"):
        table.column("two")
