"""Writes the table of measured results into README.md, from the latest record of every benchmark in results.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"
NAMES = {
    "banking77": "MiniLM-L6 classifier, BANKING77, `--max-drop 1% --minutes 20`",
    "banking77-untrained": "the same, `--minutes 0`",
    "banking77-twice": "the same, `--speedup 2 --minutes 5`",
    "newsgroups": "all-MiniLM-L6-v2 as an embedder, 20 newsgroups, `--max-drop 2% --minutes 20`",
}


def latest() -> dict[str, dict[str, Any]]:
    """The last record of step "prune" of every benchmark."""
    lines = (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return {r["benchmark"]: r for r in records if r.get("step") == "prune" and "speedup" in r}


def row(name: str, record: dict[str, Any]) -> str:
    speed, drop = record["speedup"], record["drop"]
    percent = record["quality_metric"] == "accuracy"
    scale, digits = (100, 2) if percent else (1, 4)
    unit = " points" if percent else ""
    p50 = record["latency_ms_p50"]
    cells = (
        NAMES.get(name, name),
        record["candidate"],
        f"**{speed['value']:.2f}x** [{speed['low']:.2f}, {speed['high']:.2f}] against {record['speedup_against']}",
        f"{p50['dense']:.2f} to {p50['pruned']:.2f} ms",
        f"{record['quality_metric']} {record['quality_dense'] * scale:.{digits}f} to "
        f"{record['quality_pruned'] * scale:.{digits}f}",
        f"{drop['value'] * scale:.{digits}f} "
        f"[{drop['low'] * scale:.{digits}f}, {drop['high'] * scale:.{digits}f}]{unit}",
        "yes" if record["accepted"] else "no",
    )
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    records = latest()
    head = ("job", "the tool's answer", "texts per second", "one text, p50", "on the test split", "drop", "accepted")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [row(name, records[name]) for name in NAMES if name in records]
    cards = {(r["machine"]["cpu"], r["machine"]["cores"], tuple(r["machine"]["flags"])) for r in records.values()}
    for cpu, cores, flags in sorted(cards):
        lines += ["", f"Measured on {cpu}, {cores} cores ({', '.join(flags)}); intervals at 95 %."]
    return "\n".join(lines)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
