"""The subcommands of `paredown tokens`: which tokens to leave out while a model runs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from paredown.cli import _options as options
from paredown.cli._progress import shown
from paredown.cli._studies import Data, Model, Out, asked, finished, make_folder, names, shares
from paredown.errors import ParedownError

WHAT = "What to try"

app = typer.Typer(
    name="tokens",
    help="Find which tokens of a text can be left out of the later layers, while the model runs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Target = Annotated[
    options.TargetName, typer.Option("--target", help="The runtime to be fast on.", rich_help_panel=options.TARGET)
]
Scorers = Annotated[
    str,
    typer.Option(
        "--scorers",
        metavar="A,B",
        help="learned, norm, attention, cls_attention, key_norm, random, last.",
        rich_help_panel=WHAT,
    ),
]


def whole(text: str) -> list[int]:
    """The numbers that "1,2,3" means."""
    found = names(text)
    if not all(one.isdigit() for one in found):
        raise ParedownError(f"{text!r} is not a list of whole numbers: write 1,2,3")
    return [int(one) for one in found]


@app.command()
def sweep(
    model: Model,
    *,
    data: Data,
    eval: options.Eval = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="A,B",
            help="What the rule reads: by default the shares of tokens that stay.",
            rich_help_panel=WHAT,
        ),
    ] = "0.5,0.6,0.7,0.8",
    after: Annotated[
        str,
        typer.Option(
            "--after",
            metavar="A,B",
            help="Shares (33%) or numbers of layers before that; 4+8 is one policy of two stages.",
            rich_help_panel=WHAT,
        ),
    ] = "17%,33%,50%",
    scorers: Scorers = "learned,norm",
    rule: Annotated[
        Literal["ratio", "quantile", "threshold"],
        typer.Option("--rule", help="Share kept, quantile or score below which tokens go.", rich_help_panel=WHAT),
    ] = "ratio",
    action: Annotated[
        Literal["drop", "merge"],
        typer.Option("--action", help="Drop tokens, or merge them with the most similar.", rich_help_panel=WHAT),
    ] = "drop",
    least: Annotated[
        int, typer.Option("--least", min=1, metavar="N", help="No text falls below that.", rich_help_panel=WHAT)
    ] = 1,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="FOLDER",
            help="Try this one as it is: what --out of a sweep or search made.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    exit: Annotated[
        bool, typer.Option("--exit", help="Dropped tokens count in the mean, by a linear map.", rich_help_panel=WHAT)
    ] = False,
    max_drop: options.MaxDrop = None,
    confidence: options.Confidence = 0.9,
    target: Target = "torch",
    precision: Annotated[
        Literal["fp32", "bf16"],
        typer.Option("--precision", help="bf16: on torch, where the CPU has it.", rich_help_panel=options.TARGET),
    ] = "fp32",
    max_length: options.MaxLength = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Try policies side by side: quality against speed, and the fastest that passes."""
    make_folder(out)
    what = asked(model, data, eval, text_column, label_column, False, max_length, threads, seed)
    with shown() as progress:
        from paredown import pipeline

        tokens = pipeline.TokenSettings(
            scorers=tuple(names(scorers)),
            after=tuple(tuple(shares(one.replace("+", ","))) for one in names(after)),
            keep=tuple(shares(keep)),
            rule=rule,
            action=action,
            least=least,
            exit=exit,
            confidence=confidence,
            target=target,
            precision=precision,
            **({} if max_drop is None else {"max_drop": max_drop}),
        )
        facts = pipeline.sweep_tokens(pipeline.StudySettings(**what), tokens, policy=policy, out=out, progress=progress)
    return finished(facts, "sweep", out, json)


@app.command()
def search(
    model: Model,
    *,
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="A.CSV,B.CSV", help="Files of labelled texts.", rich_help_panel=options.DATA),
    ],
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    least: Annotated[
        str, typer.Option("--s", metavar="A,B", help="Tokens that stay at least.", rich_help_panel=WHAT)
    ] = "15,32,64,128",
    quantile: Annotated[
        str, typer.Option("--q", metavar="A,B", help="Quantiles below which tokens go.", rich_help_panel=WHAT)
    ] = "0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    after: Annotated[
        str, typer.Option("--l", metavar="A,B", help="Layers before that.", rich_help_panel=WHAT)
    ] = "1,2,3",
    scorer: Annotated[
        str, typer.Option("--scorer", metavar="NAME", help="What ranks tokens.", rich_help_panel=WHAT)
    ] = "attention",
    max_drop: options.MaxDrop = None,
    shots: Annotated[
        int, typer.Option("--shots", min=1, metavar="N", help="Texts per class to learn from.", rich_help_panel=WHAT)
    ] = 10,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Draws of them.", rich_help_panel=WHAT)] = 3,
    target: Target = "torch",
    max_length: options.MaxLength = None,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Find one (s, q, l) for several tasks: texts above s tokens lose, after layer l, those below the q-quantile."""
    make_folder(out)
    with shown() as progress:
        from paredown import pipeline

        settings = pipeline.SearchSettings(
            least=tuple(whole(least)),
            quantile=tuple(shares(quantile)),
            after=tuple(whole(after)),
            scorer=scorer.replace("-", "_"),
            shots=shots,
            seeds=seeds,
            target=target,
            **({} if max_drop is None else {"max_drop": max_drop}),
        )
        facts = pipeline.search_tokens(
            model,
            [path.strip() for path in tasks.split(",") if path.strip()],
            settings,
            text_column=text_column,
            label_column=label_column,
            max_length=max_length,
            threads=threads,
            seed=seed,
            out=out,
            progress=progress,
        )
    return finished(facts, "search", out, json)
