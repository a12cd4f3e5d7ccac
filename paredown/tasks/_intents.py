"""Files of intents as CLINC150 comes (Larson et al. 2019): one JSON object of parts, each a list of [text, intent]."""

from __future__ import annotations

import json
import re

PARTS = ("train", "val", "test")  # in scope; `oos_train` and so on hold what belongs to no intent
OUT_OF_SCOPE = "oos_"

_WHITE = re.compile(r"\s*")

Entries = dict[str, list[tuple[int, object]]]


def looks_whole(text: str) -> bool:
    """Whether a JSON text is one object over several lines, rather than one object per line."""
    return text.lstrip().partition("\n")[0].strip() == "{"


def intents(text: str) -> Entries | None:
    """Every list of the object with the line (from 1) of each entry; None where the text is no file of intents.

    Raises json.JSONDecodeError where a text that `looks_whole` is not JSON.
    """
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and looks_whole(text):
            raise
        return None
    if not isinstance(whole, dict) or not any(isinstance(whole.get(part), list) for part in PARTS):
        return None
    return _with_lines(text)


def _with_lines(text: str) -> Entries:
    """The same lists, decoded entry by entry: `json` does not tell where a value stood. The text must be JSON."""
    decoder = json.JSONDecoder()
    found: Entries = {}
    line, counted = 1, 0

    def skipped(at: int) -> int:
        """The next place that is not white space."""
        match = _WHITE.match(text, at)
        assert match is not None
        return match.end()

    def next_one(at: int) -> int:
        """The same, behind a comma if there is one."""
        at = skipped(at)
        return skipped(at + 1) if text[at] == "," else at

    at = skipped(skipped(0) + 1)
    while text[at] != "}":
        name, at = decoder.raw_decode(text, at)
        at = skipped(skipped(at) + 1)
        if text[at] != "[":
            _, at = decoder.raw_decode(text, at)
            at = next_one(at)
            continue
        entries: list[tuple[int, object]] = []
        at = skipped(at + 1)
        while text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            entries.append((line, value))
            at = next_one(at)
        found[name] = entries
        at = next_one(at + 1)
    return found
