"""What is inside a bundle, as facts and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.report import terminal, words

if TYPE_CHECKING:
    from paredown.bundle import Bundle
    from paredown.types import GraphAnatomy

# What is taken over from the manifest as it is: of every bundle, of transformers, of networks.
_COPIED = ("accepted", "task", "family", "target", "precision", "file", "plan_id", "created", "paredown")
_OF_TEXTS = ("pooling", "normalize", "max_length", "folds")
_OF_PICTURES = ("source", "size", "mean", "std")


def facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that `paredown inspect` shows: the manifest without the model's config, widths, files, the report.

    `layers` has one entry per layer that stays: its index in the dense model, and how many heads and neurons it keeps.
    Of a network, `groups` tells the channels kept of every group, none where its residual branch is gone, and
    `branches` what became of those. `report` is empty when the bundle was saved without one.
    """
    manifest = bundle.manifest
    network = manifest["family"] == "graph"
    return {
        "bundle": str(bundle.folder),
        **{key: manifest.get(key) for key in (*_COPIED, *(_OF_PICTURES if network else _OF_TEXTS))},
        "labels": len(manifest.get("labels") or ()),
        **(_channels(bundle) if network else _layers(bundle)),
        "files": {name: (bundle.folder / name).stat().st_size for name in sorted(manifest["files"])},
        "report": bundle.report() if "report.json" in manifest["files"] else {},
    }


def _layers(bundle: Bundle) -> dict[str, Any]:
    keep = bundle.plan.keep
    return {
        "layers": [
            {
                "layer": layer,
                "heads": len(keep.get(f"layer.{layer}.heads", ())),
                "neurons": len(keep.get(f"layer.{layer}.neurons", ())),
            }
            for layer in keep.get("layers", ())
        ]
    }


def _channels(bundle: Bundle) -> dict[str, Any]:
    anatomy = cast("GraphAnatomy", bundle.anatomy())
    gone = anatomy.gone(bundle.plan)
    dead = {name for branch in gone for name in branch.groups}
    kept = {group.name: 0 if group.name in dead else len(bundle.plan.keep[group.name]) for group in anatomy.channels}
    return {
        "groups": [{"group": group.name, "kept": kept[group.name], "of": group.units} for group in anatomy.channels],
        "branches": {"of": len(anatomy.branches), "gone": [branch.name for branch in gone]},
    }


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The facts as tables: what it is, widths per layer, files with their sizes, and the figures of its run."""
    widths = _widths(found) if "layers" in found else _groups(found)
    parts: list[RenderableType] = [_about(found), Text(), widths, Text(), _files(found["files"])]
    if found["report"]:
        parts += [Text(), terminal.summary({**found["report"], "candidates": None, "accepted": found["accepted"]})]
    return Group(*parts)


def _about(found: Mapping[str, Any]) -> Table:
    report = found["report"]
    texts = "layers" in found
    task = f"{found['task']} ({found['labels']} labels)" if found["labels"] else found["task"]
    rows = {
        "bundle": found["bundle"],
        "accepted": "yes" if found["accepted"] else "no",
        "model": report.get("model") or found.get("source"),
        "task": task,
        "family": f"{found['family']}, {found['pooling']} pooling" if texts else "",
        "serves": f"{found['file']} ({found['precision']} on {found['target']})",
        "longest text": f"{found['max_length']} tokens" if texts else "",
        "pictures": "" if texts else " x ".join(map(str, found["size"])),
        "normalized with": "" if texts else f"mean {_numbers(found['mean'])}, std {_numbers(found['std'])}",
        "branches": "" if texts else _branches(found["branches"]),
        "parameters": _before_and_after(report.get("parameters_dense"), report.get("parameters_pruned")),
        "zeros": words.zeros(report),
        "plan": str(found["plan_id"])[:12],
        "made": f"{found['created']}, paredown {found['paredown']}",
    }
    table = _grid()
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="bold"), Text(str(value)))
    for number, fold in enumerate(found.get("folds") or ()):
        table.add_row(Text("" if number else "folds", style="bold"), Text(str(fold)))
    return table


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _branches(found: Mapping[str, Any]) -> str:
    """How many residual branches are left, and which are gone; nothing where there were none."""
    if not found["of"]:
        return ""
    kept = f"{found['of'] - len(found['gone'])} of {found['of']}"
    return f"{kept}; gone: {', '.join(found['gone'])}" if found["gone"] else kept


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


def _groups(found: Mapping[str, Any]) -> Table:
    table = _grid("channels of", "kept")
    for row in found["groups"]:
        kept = _of(row["kept"], row["of"]) if row["kept"] else "gone"
        table.add_row(Text(row["group"]), kept, style="" if row["kept"] else "dim")
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
