"""The subcommand that learns intents from a few texts each: fewshot."""

from __future__ import annotations

from typing import Annotated

import typer

from paredown.cli import _options as options
from paredown.cli._progress import shown
from paredown.cli._studies import WHAT, Out, make_folder, show_and_keep
from paredown.errors import ParedownError


def fewshot(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder of transformers, a name on the hub, or a bundle.")
    ],
    *,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Labelled texts to draw from.", rich_help_panel=options.DATA)
    ],
    eval: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Labelled texts to test on; without it CLINC150's own test part, or 40 % of each label.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="A bundle or model to compare with MODEL on the same draws; may be given again. "
            "A bundle as MODEL is by itself compared with its dense model.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    shots: Annotated[
        str, typer.Option("--shots", metavar="A,B", help="Texts of each label to learn from.", rich_help_panel=WHAT)
    ] = "1,2,3,5,10",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="Draws of shots.", rich_help_panel=WHAT)
    ] = 10,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    max_length: options.MaxLength = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Learn intents from a few texts each on MODEL's frozen embeddings: accuracy, weighted F1, embedding time."""
    numbers = _numbers(shots)
    make_folder(out)
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.fewshot(
            model,
            data=data,
            eval=eval,
            against=against or (),
            shots=numbers,
            seeds=seeds,
            text_column=text_column,
            label_column=label_column,
            max_length=max_length,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    from paredown.report import fewshot as report

    return show_and_keep(facts, "fewshot", out, json, table=report.table, page=report.write)


def _numbers(text: str) -> list[int]:
    """The whole numbers that "1,2,5" means."""
    said = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((part for part in said if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None or not said:
        raise ParedownError(f"{(wrong or text)!r} is not a number of shots: write whole numbers, such as 1,2,5")
    return [int(part) for part in said]
