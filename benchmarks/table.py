"""Writes the table of measured results into README.md, from the latest record of every benchmark in results.jsonl."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"
NAMES = {
    "banking77": "MiniLM-L6 classifier, BANKING77, `--max-drop 1% --minutes 20`",
    "banking77-untrained": "the same, `--minutes 0`",
    "banking77-twice": "the same, `--speedup 2 --minutes 2`",
    "newsgroups": "all-MiniLM-L6-v2 as an embedder, 20 newsgroups, `--max-drop 2% --minutes 5`",
}


def latest() -> dict[str, list[dict[str, Any]]]:
    """Of every benchmark the last record of step "prune", and the validations that followed it."""
    lines = (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[dict[str, Any]]] = {}
    for record in (json.loads(line) for line in lines if line.strip()):
        if record["step"] == "prune":
            found[record["benchmark"]] = []
        if "speedup" in record and record["benchmark"] in found:  # else it ended in an error
            found[record["benchmark"]].append(record)
    return {name: records for name, records in found.items() if records}


def speed_of(record: dict[str, Any]) -> str:
    speed = record["speedup"]
    against = record["speedup_against"].split("/")[-1]  # a validation names the model's folder too
    return f"**{speed['value']:.2f}x** [{speed['low']:.2f}, {speed['high']:.2f}] against {against}"


def quality_of(record: dict[str, Any]) -> tuple[str, str]:
    drop = record["drop"]
    percent = record["quality_metric"] == "accuracy"
    scale, digits = (100, 2) if percent else (1, 4)
    before, after = record["quality_dense"] * scale, record["quality_pruned"] * scale
    value, low, high = (drop[key] * scale for key in ("value", "low", "high"))
    return (
        f"{record['quality_metric']} {before:.{digits}f} to {after:.{digits}f}",
        f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{' points' if percent else ''}",
    )


def lines_of(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + " --- |" * len(cells[0]), *rows]


def table() -> str:
    records = {name: latest()[name] for name in NAMES if name in latest()}
    runs = [("job", "the tool's answer", "texts per second", "one text, p50", "on the test split", "drop", "accepted")]
    checks = [("proved again", "texts per second", "one text, p50", "on the whole file", "drop", "holds")]
    for name, (made, *validations) in records.items():
        p50 = "{dense:.2f} to {pruned:.2f} ms".format_map
        runs.append(
            (NAMES[name], made["candidate"], speed_of(made), p50(made["latency_ms_p50"]), *quality_of(made), yes(made))
        )
        checks += [
            (f"{name}: {one['step']}", speed_of(one), p50(one["latency_ms_p50"]), *quality_of(one), yes(one))
            for one in validations
        ]
    lines = lines_of(runs) + (["", *lines_of(checks)] if checks[1:] else [])
    cards = {
        (r["machine"]["cpu"], r["machine"]["cores"], tuple(r["machine"]["flags"]))
        for rs in records.values()
        for r in rs
    }
    for cpu, cores, flags in sorted(cards):
        lines += ["", f"Measured on {cpu}, {cores} cores ({', '.join(flags)}); intervals at 95 %."]
    return "\n".join(lines)


def yes(record: dict[str, Any]) -> str:
    return "yes" if record["accepted"] else "no"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
