"""The subcommands that make sentence encoders: embedder train, embedder distill."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paredown.cli import _options as options
from paredown.cli import _output
from paredown.cli._progress import shown
from paredown.errors import ParedownError

TRAINING = "Training"

app = typer.Typer(
    name="embedder",
    help="Make small sentence encoders: train one on pairs, or distil a deep one into fewer layers.",
    add_completion=False,
    no_args_is_help=True,
)

Out = Annotated[
    str,
    typer.Option(
        "--out", metavar="DIR", help="The folder of the model, for sentence-transformers.", rich_help_panel=options.RUN
    ),
]
EvalTextColumn = Annotated[
    str | None,
    typer.Option(
        "--eval-text-column",
        metavar="NAME",
        help="The column of --eval's texts, where it has another name.",
        rich_help_panel=options.DATA,
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Batches to learn from.", rich_help_panel=TRAINING)
]
Epochs = Annotated[
    float | None, typer.Option("--epochs", metavar="N", help="Rounds through the data.", rich_help_panel=TRAINING)
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="N", help="Training time; 10 by default.", rich_help_panel=TRAINING),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=2, metavar="N", help="Texts, or pairs, of a batch.", rich_help_panel=TRAINING)
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", help="Cut texts after N tokens.", rich_help_panel=options.DATA),
]


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of transformers or sentence-transformers.")],
    *,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="FILE", help="Pairs of texts, or texts with labels.", rich_help_panel=options.DATA
        ),
    ],
    eval: options.Eval = None,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    negative_column: Annotated[
        str | None,
        typer.Option(
            "--negative-column",
            metavar="NAME",
            help="The column of texts that do not belong to the first: hard negatives.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    label_column: options.LabelColumn = None,
    score_column: options.ScoreColumn = None,
    minimum_score: Annotated[
        float | None,
        typer.Option(
            "--minimum-score",
            metavar="N",
            help="Learn from pairs with this score or more; 80 % of the highest by default.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    eval_text_column: EvalTextColumn = None,
    max_length: MaxLength = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="N", help="At its peak; 5e-5 by default.", rich_help_panel=TRAINING),
    ] = None,
    out: Out,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Train MODEL on pairs of texts that belong together: of all texts of a batch, a text's partner becomes nearest."""
    asked: dict[str, Any] = {
        "negative_column": negative_column,
        "label_column": label_column,
        "minimum_score": minimum_score,
    }
    columns = (text_column, pair_column, score_column, eval_text_column)
    course = (epochs, minutes, steps, batch_size, learning_rate)
    asked |= _shared(model, data, eval, out, columns, course, max_length, threads, seed)
    with shown(resumable=True) as progress:
        from paredown import pipeline

        facts = pipeline.train_embedder(pipeline.EmbedderSettings(**asked), progress=progress)
    return _finished(facts, json)


@app.command()
def distill(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="A folder of transformers or sentence-transformers.")
    ],
    *,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Texts; labels are not needed.", rich_help_panel=options.DATA)
    ],
    eval: options.Eval = None,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    score_column: options.ScoreColumn = None,
    eval_text_column: EvalTextColumn = None,
    max_length: MaxLength = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, metavar="N", help="Layers to keep, evenly spread.", rich_help_panel=TRAINING),
    ] = None,
    keep_layers: Annotated[
        str | None,
        typer.Option("--keep-layers", metavar="A,B", help="Or which ones, from 0.", rich_help_panel=TRAINING),
    ] = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="N",
            help="At its peak; 4e-4 by default at width 384, less for wider models.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    out: Out,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Distil TEACHER into fewer layers: a student that gives nearly the same embeddings, in less time."""
    asked: dict[str, Any] = {"layers": layers, "keep_layers": _numbers(keep_layers)}
    columns = (text_column, pair_column, score_column, eval_text_column)
    course = (epochs, minutes, steps, batch_size, learning_rate)
    asked |= _shared(teacher, data, eval, out, columns, course, max_length, threads, seed)
    with shown(resumable=True) as progress:
        from paredown import pipeline

        facts = pipeline.distill_embedder(pipeline.EmbedderSettings(**asked), progress=progress)
    return _finished(facts, json)


def _shared(
    model: str,
    data: str,
    eval: str | None,
    out: str,
    columns: tuple[str | None, ...],
    course: tuple[float | int | None, ...],
    max_length: int | None,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    named = ("text_column", "pair_column", "score_column", "eval_text_column")
    taught = ("epochs", "minutes", "steps", "batch_size", "learning_rate")
    return {
        "model": model,
        "data": data,
        "eval": eval,
        "out": out,
        **dict(zip(named, columns, strict=True)),
        **dict(zip(taught, course, strict=True)),
        "max_length": max_length,
        "threads": threads,
        "seed": seed,
    }


def _numbers(text: str | None) -> tuple[int, ...]:
    """The layers that "0,2,5" means."""
    try:
        return tuple(int(number) for number in (text or "").split(",") if number.strip())
    except ValueError:
        raise ParedownError(f"--keep-layers takes numbers such as 0,2,5, not {text!r}") from None


def _finished(facts: dict[str, Any], as_json: bool) -> int:
    from paredown.report import embedder

    return _output.finished(facts, embedder.terminal(facts), as_json=as_json)
