"""What is inside a bundle, as facts and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.report import terminal

if TYPE_CHECKING:
    from paredown.bundle import Bundle

# What is taken over from the manifest as it is.
_COPIED = (
    *("accepted", "task", "family", "target", "precision", "file", "pooling", "normalize", "max_length", "folds"),
    *("plan_id", "created", "paredown"),
)


def facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that `paredown inspect` shows: the manifest without the model's config, widths, files, the report.

    `layers` has one entry per layer that stays: its index in the dense model, and how many heads and neurons it keeps.
    `report` is empty when the bundle was saved without one.
    """
    manifest, keep = bundle.manifest, bundle.plan.keep
    return {
        "bundle": str(bundle.folder),
        **{key: manifest.get(key) for key in _COPIED},
        "labels": len(manifest.get("labels") or ()),
        "layers": [
            {
                "layer": layer,
                "heads": len(keep.get(f"layer.{layer}.heads", ())),
                "neurons": len(keep.get(f"layer.{layer}.neurons", ())),
            }
            for layer in keep.get("layers", ())
        ],
        "files": {name: (bundle.folder / name).stat().st_size for name in sorted(manifest["files"])},
        "report": bundle.report() if "report.json" in manifest["files"] else {},
    }


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The facts as tables: what it is, widths per layer, files with their sizes, and the figures of its run."""
    parts: list[RenderableType] = [_about(found), Text(), _widths(found), Text(), _files(found["files"])]
    if found["report"]:
        parts += [Text(), terminal.summary({**found["report"], "candidates": None, "accepted": found["accepted"]})]
    return Group(*parts)


def _about(found: Mapping[str, Any]) -> Table:
    report = found["report"]
    task = f"{found['task']} ({found['labels']} labels)" if found["labels"] else found["task"]
    rows = {
        "bundle": found["bundle"],
        "accepted": "yes" if found["accepted"] else "no",
        "model": report.get("model"),
        "task": task,
        "family": f"{found['family']}, {found['pooling']} pooling",
        "serves": f"{found['file']} ({found['precision']} on {found['target']})",
        "longest text": f"{found['max_length']} tokens",
        "parameters": _before_and_after(report.get("parameters_dense"), report.get("parameters_pruned")),
        "plan": str(found["plan_id"])[:12],
        "made": f"{found['created']}, paredown {found['paredown']}",
    }
    table = _grid()
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="bold"), Text(str(value)))
    for number, fold in enumerate(found["folds"] or ()):
        table.add_row(Text("" if number else "folds", style="bold"), Text(str(fold)))
    return table


def _before_and_after(dense: object, pruned: object) -> str:
    return f"{dense:,} → {pruned:,}" if isinstance(dense, int) and isinstance(pruned, int) else ""


def _widths(found: Mapping[str, Any]) -> Table:
    whole = found["report"].get("anatomy") or {}
    table = _grid("layer", "heads", "neurons")
    for row in found["layers"]:
        table.add_row(
            str(row["layer"]), _of(row["heads"], whole.get("heads")), _of(row["neurons"], whole.get("neurons"))
        )
    gone = sorted(set(range(whole.get("layers") or 0)) - {row["layer"] for row in found["layers"]})
    if gone:
        table.add_row(", ".join(map(str, gone)), "gone", "gone", style="dim")
    return table


def _of(kept: int, whole: object) -> str:
    return f"{kept} of {whole}" if isinstance(whole, int) else str(kept)


def _files(sizes: Mapping[str, int]) -> Table:
    table = _grid("file", "MB")
    for name, size in {**sizes, "all": sum(sizes.values())}.items():
        table.add_row(Text(name), f"{size / 1e6:,.2f}", style="bold" if name == "all" else "")
    return table


def _grid(first: str = "", *figures: str) -> Table:
    """A table without lines: texts on the left, figures on the right."""
    table = Table(box=None, pad_edge=False, show_header=bool(first), header_style="bold", padding=(0, 3, 0, 0))
    table.add_column(first, overflow="fold")
    for title in figures:
        table.add_column(title, justify="right", no_wrap=True)
    if not figures:
        table.add_column(overflow="fold")
    return table
