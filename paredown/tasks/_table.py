"""Small readers of CSV, TSV and JSON-lines files that say file and line when something is wrong with them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paredown.errors import BadData
from paredown.tasks._intents import OUT_OF_SCOPE, PARTS, Entries, intents, looks_whole

Row = tuple[str | None, ...]  # None: this row has no such cell
TEXT_COLUMNS = ("text", "sentence", "content", "utterance", "query", "question", "message", "document", "input")
INTENT_COLUMNS = ("text", "intent")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Table:
    """Rows of text cells. `lines[i]` is the line of the file (from 1) at which row i begins."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def listed(self) -> str:
        """The names of the columns, as an error message shows them."""
        return _listed(self.columns)

    def column(self, name: str) -> list[str]:
        """The cells of one column, in the rows' order. Raises BadData if it is missing, in the table or in one row."""
        if self.columns.count(name) != 1:
            what = "no column" if name not in self.columns else "more than one column"
            raise BadData(f"{self.path}: there is {what} {name!r}; the columns are {self.listed}.")
        at = self.columns.index(name)
        cells = []
        for row, line in zip(self.rows, self.lines, strict=True):
            cell = row[at]
            if cell is None:
                raise BadData(f"{self.path}, line {line}: this row has no {name!r}.")
            cells.append(cell)
        return cells

    def first_of(self, names: Sequence[str]) -> str | None:
        """The column that carries the earliest of `names`, whatever its capitals; None if there is none."""
        present = {column.casefold(): column for column in reversed(self.columns)}
        return next((present[name] for name in names if name in present), None)


def read_table(path: str | Path, *, wanted: Sequence[str | None] = (), part: str = "train") -> Table:
    """The table in a .csv, .tsv, .jsonl or .json (one object per line) file; UTF-8, with or without a BOM.

    `wanted` names the columns that will be asked for. If one of them is a number that the header does not hold, the
    file has no header: its columns are then called "1", "2", ... and its rows may differ in length (STS-B). Of a .json
    file of intents (CLINC150) the `part` is read, "train", "val" or "test", with the columns text and intent. Raises
    BadData that names the file, the line and what is wrong.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, list[str]]]]] = {".csv": _csv_rows, ".tsv": _tsv_rows}
    suffix = path.suffix.lower()
    if suffix not in (*readers, ".jsonl", ".json"):
        raise BadData(f"{path}: a data file must end in .csv, .tsv, .jsonl or .json, not in {suffix!r}.")
    text = read_text(path)
    if suffix in readers:
        table = _cell_table(path, readers[suffix](path, text), wanted)
    else:
        found = _intents(path, text) if suffix == ".json" else None
        table = _json_table(path, text) if found is None else _intent_table(path, found, part)
    if not table.rows:
        raise BadData(f"{path}: there is a header but no data row below it.")
    return table


def intent_parts(path: str | Path) -> tuple[str, ...]:
    """The parts that a .json file of intents has, of "train", "val" and "test"; none where it is another file."""
    path = Path(path)
    found = _intents(path, read_text(path)) if path.suffix.lower() == ".json" else None
    return tuple(part for part in PARTS if found and found.get(part))


def usable_rows(table: Table, *columns: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """The rows in which none of the text columns is empty, and the table's notes with a count of those dropped."""
    kept = [i for i, row in enumerate(zip(*columns, strict=True)) if all(cell.strip() for cell in row)]
    dropped = len(table) - len(kept)
    if not kept:
        raise BadData(f"{table.path}: every row has an empty text.")
    said = f"{table.path}: {count(dropped, 'row')} with an empty text dropped."
    return kept, (*table.notes, said) if dropped else table.notes


def count(number: int, noun: str) -> str:
    """The number with its noun in the right form, as messages show it."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read_text(path: Path) -> str:
    if path.is_dir():
        raise BadData(f"{path}: this is a folder; give a CSV, TSV or JSONL file.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file.") from None
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror}).") from error
    raw = raw.removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"0x{raw[error.start]:02x}"
        raise BadData(f"{path}, line {line}: byte {byte} is not UTF-8 text; save the file as UTF-8.") from None
    if not text.strip():
        raise BadData(f"{path}: the file is empty.")
    return text


def _cell_table(path: Path, found: Iterator[tuple[int, list[str]]], wanted: Sequence[str | None]) -> Table:
    lines, rows = zip(*found, strict=True)
    header = tuple(name.strip() for name in rows[0])
    by_number = [name for name in wanted if name and name.isdecimal() and name not in header]
    if by_number:
        width = max(map(len, rows))
        padded = tuple((*row, *[None] * (width - len(row))) for row in rows)
        note = f"{path} is read as a file without a header, because column {by_number[0]} was asked for by number."
        return Table(path, tuple(str(i + 1) for i in range(width)), padded, lines, (note,))
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise BadData(_ragged(path, line, len(row), len(header)))
    return Table(path, header, tuple(map(tuple, rows[1:])), lines[1:])


def _ragged(path: Path, line: int, cells: int, columns: int) -> str:
    hint = " (for a file without a header, give columns by number)" if line > 1 else ""
    return f"{path}, line {line}: this row has {count(cells, 'cell')} where the header has {columns}{hint}."


def _csv_rows(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    usual = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a cell may be a whole document
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"{path}, line {line}: the quotes of this row do not match ({error}).") from None
    finally:
        csv.field_size_limit(usual)


def _tsv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated files come with bare quotation marks (STS-B, GLUE) and with CSV quoting (pandas).

    Read as CSV, one bare mark at the start of a cell may swallow every row up to the next one. So every line is a row,
    and only if their lengths differ and CSV quoting makes them equal is the quoting real (cells with line breaks).
    """
    plain = [
        (line, [_unquoted(cell) for cell in row.rstrip("\r").split("\t")])
        for line, row in enumerate(text.split("\n"), 1)
        if row.strip("\r")
    ]
    if len({len(row) for _, row in plain}) > 1 and '"' in text:
        try:
            quoted = list(_csv_rows(path, text, "\t"))
        except BadData:
            quoted = plain
        if len({len(row) for _, row in quoted}) == 1:
            return iter(quoted)
    return iter(plain)


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _json_table(path: Path, text: str) -> Table:
    if text.lstrip().startswith("["):
        raise BadData(f"{path}, line 1: this is one JSON list; write one JSON object per line instead.")
    columns: dict[str, None] = {}
    objects: list[dict[str, str]] = []
    lines: list[int] = []
    for line, source in enumerate(text.split("\n"), 1):
        if not source.strip():
            continue
        try:
            value = json.loads(source)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "too deeply nested")
            raise BadData(f"{path}, line {line}: this is not a JSON object on one line ({reason}).") from None
        if not isinstance(value, dict):
            raise BadData(f'{path}, line {line}: expected a JSON object such as {{"text": ...}}.')
        objects.append({key: _json_cell(path, line, key, cell) for key, cell in value.items()})
        columns.update(dict.fromkeys(value))
        lines.append(line)
    rows = tuple(tuple(row.get(name) for name in columns) for row in objects)
    return Table(path, tuple(columns), rows, tuple(lines))


def _intents(path: Path, text: str) -> Entries | None:
    try:
        found = intents(text)
    except json.JSONDecodeError as error:
        raise BadData(f"{path}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    if found is None and looks_whole(text):
        raise BadData(
            f"{path}, line 1: this is one JSON object without a list 'train', 'val' or 'test' of [text, intent] pairs; "
            "write one JSON object per line instead."
        )
    return found


def _intent_table(path: Path, found: Entries, part: str) -> Table:
    if not found.get(part):
        have = ", ".join(repr(name) for name in PARTS if found.get(name))
        raise BadData(f"{path}: there is no {part!r} among the parts of this file of intents; it has {have or 'none'}.")
    rows, lines = [], []
    for line, entry in found[part]:
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(cell, str) for cell in entry):
            raise BadData(f"{path}, line {line}: expected a [text, intent] pair of two strings in {part!r}.")
        rows.append(tuple(_json_cell(path, line, name, cell) for name, cell in zip(INTENT_COLUMNS, entry, strict=True)))
        lines.append(line)
    left_out = len(found.get(OUT_OF_SCOPE + part, ()))
    said = f"{path}: the {count(len(rows), 'text')} of {part!r} are read"
    said += f"; {count(left_out, 'out-of-scope text')} of {OUT_OF_SCOPE + part!r} left out." if left_out else "."
    return Table(path, INTENT_COLUMNS, tuple(rows), tuple(lines), (said,))


def _json_cell(path: Path, line: int, key: str, value: object) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadData(f"{path}, line {line}: {key!r} holds half a surrogate pair, which is not text.") from None
        return value
    return "" if value is None else json.dumps(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
