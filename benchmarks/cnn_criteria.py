"""Criteria for channels compared on a CIFAR ResNet: what is asked of `paredown compare`, its tables, and its plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RECOVERIES = {
    "none": "cut, and nothing else",
    "statistics": "batch norm's statistics moved by what the cut changed",
    "reconstruct": "re-fitted in closed form",
}
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = 3
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1b2430; } .tick { fill: #55616e; font-size: 11.5px; }
.grid { stroke: #e9edf0; } .axis-line { stroke: #8b96a2; } .leader { stroke: #a9b3bc; stroke-width: .8; }
.band { fill: #0064a4; opacity: .13; } .series { fill: none; stroke: var(--c); stroke-width: 2.2; }
text.name { fill: var(--c); } .s0 { --c: #0064a4; } .s1 { --c: #00735a; } .s2 { --c: #9a4a7e; } .s3 { --c: #8a6100; }
.s4 { --c: #2d87b8; } .s5 { --c: #b34a00; } .rest { --c: #a3adb7; } .series.rest { stroke-width: 1.2; }
text.rest { fill: #55616e; } .random { --c: #b34a00; } .series.random { stroke-dasharray: 6 4; }
"""


def asked(assets: Path, recover: str) -> tuple[str, ...]:
    """The arguments of the command; `cifar_resnet` is to be on the path."""
    archive, weights = str(assets / "data/cifar10/cifar10.npz"), assets / "models/cifar10-resnet20/model.safetensors"
    told = ("cifar_resnet:resnet20", "--weights", str(weights), "--data", archive, "--eval", archive)
    told += ("--mean", ".485,.456,.406", "--std", ".229,.224,.225", "--recover", recover)
    return (*told, "--fractions", ",".join(f"{share:g}" for share in FRACTIONS))


def text(records: Sequence[dict[str, Any]], docs: Path, lines_of: Callable[[list[list[str]]], list[str]]) -> str:
    """What `docs` says of the records; their plots are written there."""
    if not records:
        return ""
    parts = []
    for record in records:
        (docs / f"cnn-criteria-{record['recover']}.svg").write_text(plot(record), encoding="utf-8")
    for title, table in tables(records):
        parts += [f"**{title}**:", "", *lines_of(table), ""]
    return "\n".join([*parts, *below_random(records)]).rstrip()


def tables(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """(what it shows, rows with their head) of each recovery, the best criterion first, and of the arithmetic left."""
    found = []
    head = ["criterion", *(f"{share:.0%}" for share in FRACTIONS)]
    for record in records:
        rows = _rows(record)
        table = [[f"`{name}`", *(_lost(own[share]) for share in FRACTIONS)] for name, own in rows.items()]
        found.append((f"Points lost, {RECOVERIES[record['recover']]}", [head, *table]))
    dense = records[0]["macs_dense"]
    left = [
        [f"`{name}`", *(f"{own[share]['macs'] / dense:.0%}" for share in FRACTIONS)]
        for name, own in sorted(_rows(records[0]).items())
    ]
    return [*found, ("Multiply-accumulates left", [head, *left])]


def _rows(record: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(row["criterion"], {})[row["fraction"]] = row
    return dict(sorted(found.items(), key=lambda item: sum(row["drop"]["value"] for row in item[1].values())))


def _lost(row: dict[str, Any]) -> str:
    value, low, high = (100 * row["drop"][key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def below_random(records: Sequence[dict[str, Any]]) -> list[str]:
    """Where a criterion does not lose less than the random control, one sentence each."""
    found = []
    for record in records:
        rows = _rows(record)
        control = rows["random"]
        for name, own in rows.items():
            worse = [share for share in FRACTIONS if own[share]["drop"]["value"] >= control[share]["drop"]["value"]]
            if name != "random" and worse:
                shares = ", ".join(f"{share:.0%}" for share in worse)
                found.append(f"`{name}` is not above `random` at {shares} ({RECOVERIES[record['recover']]}).")
    return found


def plot(record: dict[str, Any]) -> str:
    """Points lost over the share of channels that went, as an SVG file."""
    from paredown.report import _heat

    _, picture = next(iter(_heat.curves(record)))
    start, rest = picture.split(">", 1)
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'
