"""The subcommands that look before anything is cut: score, sensitivity, compare."""

from __future__ import annotations

import json as _json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paredown.cli import _options as options
from paredown.cli import _output
from paredown.cli._progress import shown
from paredown.errors import ParedownError

if TYPE_CHECKING:
    from rich.console import RenderableType

WHAT = "What to study"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder of transformers, a name on the hub, or package.module:factory with --weights.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Examples to score with; pictures are in an NPZ, or in a folder per class.",
        rich_help_panel=options.DATA,
    ),
]
Labels = Annotated[
    bool,
    typer.Option(
        "--labels",
        help="Gradients of the task loss (labels, or next tokens), instead of the label-free divergence.",
        rich_help_panel=WHAT,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="A folder for a page, and for the figures as JSON lines.",
        rich_help_panel=options.RUN,
    ),
]
Recover = Annotated[
    Literal["none", "compensate", "statistics", "reconstruct"],
    typer.Option(
        "--recover",
        help="What is done after each cut; nothing is trained. compensate is for texts, statistics (batch norm's, "
        "taken anew) for image classifiers.",
        rich_help_panel=WHAT,
    ),
]


def _units(usual: str) -> Any:
    told = f"heads, neurons, layers, sublayers; of image classifiers channels, branches. By default {usual}."
    return typer.Option("--units", metavar="A,B", help=told, show_default=False, rich_help_panel=WHAT)


def _fractions(usual: str) -> Any:
    told = f"Shares that go: .1,.3 or 10%,30%. By default {usual}."
    return typer.Option("--fractions", metavar="A,B", help=told, show_default=False, rich_help_panel=WHAT)


def score(
    model: Model,
    *,
    data: Data,
    criterion: Annotated[
        str, typer.Option("--criterion", metavar="NAME", help="A file of paredown/importance.", rich_help_panel=WHAT)
    ] = "obs",
    eval: options.Eval = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    labels: Labels = False,
    max_length: options.MaxLength = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.PictureSize = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Show how much each head, neuron, layer or channel of MODEL matters by one criterion, as a heat map."""
    make_folder(out)
    pictures = {"weights": weights, "mean": mean, "std": std, "size": size}
    what = {**asked(model, data, eval, text_column, label_column, labels, max_length, threads, seed), **pictures}
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.score_model(
            pipeline.StudySettings(**what), criterion=criterion.replace("-", "_"), progress=progress
        )
    return finished(facts, "score", out, json)


def sensitivity(
    model: Model,
    *,
    data: Data,
    eval: options.Eval = None,
    units: Annotated[str, _units("all there are")] = "",
    fractions: Annotated[str, _fractions("quarters, of channels 10% to 70%")] = "",
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            metavar="NAME",
            help="What ranks heads, neurons and channels; obs by default.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    recover: Recover = "none",
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    labels: Labels = False,
    max_length: options.MaxLength = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.PictureSize = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Show what each layer of MODEL alone can lose: curves, heat maps, and the layers in order."""
    make_folder(out)
    pictures = {"weights": weights, "mean": mean, "std": std, "size": size}
    what = {**asked(model, data, eval, text_column, label_column, labels, max_length, threads, seed), **pictures}
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.sensitivity(
            pipeline.StudySettings(**what),
            units=names(units),
            fractions=shares(fractions),
            criterion=criterion and criterion.replace("-", "_"),
            recover=recover,
            progress=progress,
        )
    return finished(facts, "sensitivity", out, json)


def compare(
    model: Model,
    *,
    data: Data,
    eval: options.Eval = None,
    criteria: Annotated[
        str, typer.Option("--criteria", metavar="A,B", help="By default every one there is.", rich_help_panel=WHAT)
    ] = "",
    units: Annotated[str, _units("heads and neurons, or channels")] = "",
    fractions: Annotated[str, _fractions("10%, 30% and 50%, of channels 10% to 50%")] = "",
    recover: Recover = "none",
    ranking: Annotated[
        Literal["global", "layer"],
        typer.Option("--ranking", help="Over all layers, or the same share of each.", rich_help_panel=WHAT),
    ] = "global",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="Draws of calibration examples.", rich_help_panel=WHAT)
    ] = 3,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    labels: Labels = False,
    max_length: options.MaxLength = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.PictureSize = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Compare criteria on MODEL: the quality left by each, at each share, with intervals over examples and seeds."""
    make_folder(out)
    pictures = {"weights": weights, "mean": mean, "std": std, "size": size}
    what = {**asked(model, data, eval, text_column, label_column, labels, max_length, threads, seed), **pictures}
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.compare(
            pipeline.StudySettings(**what),
            criteria=names(criteria),
            units=names(units),
            fractions=shares(fractions),
            recover=recover,
            ranking=ranking,
            seeds=seeds,
            progress=progress,
        )
    return finished(facts, "compare", out, json)


def asked(
    model: str,
    data: str,
    eval: str | None,
    text_column: str | None,
    label_column: str | None,
    labels: bool,
    max_length: int | None,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    return {
        "model": model,
        "data": data,
        "eval": eval,
        "text_column": text_column,
        "label_column": label_column,
        "labels": labels,
        "max_length": max_length,
        "threads": threads,
        "seed": seed,
    }


def names(text: str) -> list[str]:
    return [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]


def shares(text: str) -> list[float]:
    """The shares that ".1,.3" or "10%,30%" mean."""
    found = []
    for said in names(text):
        try:
            found.append(float(said.removesuffix("%")) / (100 if said.endswith("%") else 1))
        except ValueError:
            raise ParedownError(f"{said!r} is not a share: write .3 or 30%") from None
    return found


def make_folder(out: str | None) -> None:
    """Makes the folder of --out before the long work: what cannot be written is told at once."""
    if out is not None:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ParedownError(f"{out} cannot be made a folder for the results: {error.strerror}") from error


def finished(facts: Mapping[str, Any], verb: str, out: str | None, as_json: bool) -> int:
    """Prints the study; with a folder, leaves a page and JSON lines there."""
    from paredown.report import study

    return show_and_keep(facts, verb, out, as_json, table=study.terminal, page=study.write)


def show_and_keep(
    facts: Mapping[str, Any],
    verb: str,
    out: str | None,
    as_json: bool,
    *,
    table: Callable[[Mapping[str, Any]], RenderableType],
    page: Callable[[Mapping[str, Any], Path], object],
) -> int:
    """The same with a table and a page of one's own. The lines are what was studied first, then each row."""
    from paredown.files import replacing

    if out is not None:
        folder = Path(out)
        rows = next((name for name in ("rows", "candidates") if name in facts), "rows")
        about = {key: value for key, value in facts.items() if key != rows}
        with replacing(folder / f"{verb}.jsonl") as beside:
            beside.write_text("".join(f"{_json.dumps(line)}\n" for line in (about, *facts.get(rows, ()))))
        page(facts, folder / f"{verb}.html")
    code = _output.finished(facts, table(facts), as_json=as_json)
    if out is not None and not as_json:
        print(f"  page: {Path(out) / f'{verb}.html'}")
    return code
