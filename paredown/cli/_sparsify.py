"""The subcommand that makes zeros."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from paredown.cli import _options as options
from paredown.cli import _output
from paredown.cli._progress import shown
from paredown.cli._values import amount

ZEROS = "Zeros"


def sparsify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of transformers, or a name on the hub.")],
    *,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Examples to decide with.", rich_help_panel=options.DATA)
    ],
    eval: options.Eval = None,
    task: options.Task = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    pair_column: options.PairColumn = None,
    score_column: options.ScoreColumn = None,
    max_length: options.MaxLength = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            metavar="SHARE",
            parser=amount,
            show_default=False,
            help="0.8 or 80% of the layers' weights become zero; n:m says it itself.",
            rich_help_panel=ZEROS,
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            metavar="NAME",
            help="unstructured; 2:4 and the like (of 4 inputs 2 stay); 4x1 and the like (outputs x inputs together).",
            rich_help_panel=ZEROS,
        ),
    ] = "unstructured",
    solver: Annotated[
        str, typer.Option("--solver", metavar="NAME", help="A file of paredown/sparsity.", rich_help_panel=ZEROS)
    ] = "sparsegpt",
    allocation: Annotated[
        Literal["uniform", "global", "owl", "measured"],
        typer.Option("--allocation", help="How the zeros are shared out over the matrices.", rich_help_panel=ZEROS),
    ] = "uniform",
    permute: Annotated[
        bool,
        typer.Option(
            "--permute", help="Let neurons change places first, so that n:m keeps more.", rich_help_panel=ZEROS
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option("--rounds", min=1, metavar="N", help="1 zeroes at once; more gradually.", rich_help_panel=ZEROS),
    ] = 1,
    schedule: Annotated[
        options.Schedule,
        typer.Option("--schedule", help="How many zeros come in which round.", rich_help_panel=ZEROS),
    ] = "cubic",
    recover: Annotated[
        Literal["none", "distill", "finetune"],
        typer.Option("--recover", help="What follows each round; zeros stay zero.", rich_help_panel=ZEROS),
    ] = "distill",
    steps: options.Steps = None,
    heads: options.Heads = 0.0,
    queries: options.Queries = 0.0,
    neurons: options.Neurons = 0.0,
    layers: options.Layers = 0.0,
    sublayers: options.Sublayers = 0.0,
    parameters: options.Parameters = None,
    criterion: options.Criterion = None,
    max_drop: options.MaxDrop = None,
    minutes: options.Minutes = 20.0,
    confidence: options.Confidence = 0.9,
    target: Annotated[
        options.SparseTargetName | None,
        typer.Option(
            "--target",
            help="The runtime to be fast on: sparse_cpu by default (the others multiply zeros), torch for a language "
            "model.",
            rich_help_panel=options.TARGET,
        ),
    ] = None,
    out: options.Out,
    config: options.Config = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Zero weights of MODEL where our CPU engine makes that pay, and write it as a bundle with its proof."""
    with shown(resumable=True) as progress:
        from paredown import pipeline

        bundle = pipeline.sparsify(
            model,
            data=data,
            eval=eval,
            out=out,
            sparsity=sparsity,
            pattern=pattern,
            solver=solver.replace("-", "_"),
            allocation=allocation,
            permute=permute,
            rounds=rounds,
            schedule=schedule,
            recover=recover,
            heads=heads,
            queries=queries,
            neurons=neurons,
            layers=layers,
            sublayers=sublayers,
            parameters=parameters,
            criterion=(criterion or "").replace("-", "_"),
            task=task,
            text_column=text_column,
            label_column=label_column,
            pair_column=pair_column,
            score_column=score_column,
            max_drop=max_drop,
            target=target or "",
            steps=steps,
            minutes=minutes,
            confidence=confidence,
            seed=seed,
            threads=threads,
            max_length=max_length,
            progress=progress,
        )
    return _output.show_run(bundle.report(), as_json=json)
