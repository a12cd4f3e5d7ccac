"""The subcommands. Each parses its options, calls one verb of `paredown.pipeline`, and prints what came back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paredown.cli import _bench_sparse, _embedder, _fewshot, _output, _sparsify, _studies, _tokens
from paredown.cli import _options as options
from paredown.cli._progress import shown
from paredown.errors import GateFailed

app = typer.Typer(
    name="paredown",
    help="Pare a trained model down to what your machine serves fast, and prove it.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def command() -> Any:
    """The whole command line, ready to be called with arguments."""
    return typer.main.get_command(app)


def _print_version(asked: bool) -> None:
    if asked:
        from paredown import __version__

        print(f"paredown {__version__}")
        raise typer.Exit


@app.callback()
def paredown(
    version: Annotated[
        bool, typer.Option("--version", help="The version, and nothing else.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Pare a trained model down to what your machine serves fast, and prove it."""


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder of transformers, a name on the hub, or package.module:factory."),
    ],
    *,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Examples to prune with.", rich_help_panel=options.DATA)
    ],
    eval: options.Eval = None,
    task: options.Task = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    pair_column: options.PairColumn = None,
    score_column: options.ScoreColumn = None,
    max_length: options.MaxLength = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.PictureSize = None,
    max_drop: options.MaxDrop = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            "--speedup",
            metavar="TIMES",
            help="The dial: so many times the texts, or pictures, per second.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            "--latency-ms",
            metavar="MS",
            help="The dial: milliseconds for one text or picture, at the median.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    heads: options.Heads = 0.0,
    queries: options.Queries = 0.0,
    neurons: options.Neurons = 0.0,
    layers: options.Layers = 0.0,
    sublayers: options.Sublayers = 0.0,
    parameters: options.Parameters = None,
    channels: options.Channels = 0.0,
    macs: options.Macs = None,
    minimum_channels: options.MinimumChannels = 0.1,
    multiple_of: options.MultipleOf = None,
    whole: options.Whole = None,
    layer_shares: options.LayerShares = None,
    by_sensitivity: options.BySensitivity = False,
    mirrored: options.Mirrored = True,
    criterion: options.Criterion = None,
    depth_criterion: options.DepthCriterion = "removal_loss",
    ranking: options.HowRanked = "global",
    protect: options.Protect = None,
    minimum_heads: options.MinimumHeads = 1,
    minimum_neurons: options.MinimumNeurons = 1,
    rounds: options.Rounds = 1,
    schedule: options.HowScheduled = "cubic",
    recover: options.HowRecovered = "distill",
    lora: options.Lora = 0,
    steps: options.Steps = None,
    minutes: options.Minutes = 20.0,
    confidence: options.Confidence = 0.9,
    target: Annotated[
        options.TargetName | None,
        typer.Option(
            "--target",
            help="The runtime to be fast on: onnxruntime by default, torch for a language model.",
            rich_help_panel=options.TARGET,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="The same widths in every layer: a checkpoint that stock AutoModel opens.",
            rich_help_panel=options.TARGET,
        ),
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="DIR",
            help="A token policy to try instead of the usual ones: what tokens sweep or search wrote.",
            rich_help_panel=options.TARGET,
        ),
    ] = None,
    out: options.Out,
    config: options.Config = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Find the fastest form of MODEL that is as good as you ask, and write it as a bundle with its proof."""
    speedup, latency_ms = options.one_dial(context, speedup, latency_ms)
    with shown(resumable=True) as progress:
        from paredown import pipeline

        bundle = pipeline.prune(
            model,
            data=data,
            eval=eval,
            out=out,
            task=task,
            text_column=text_column,
            label_column=label_column,
            pair_column=pair_column,
            score_column=score_column,
            max_drop=max_drop,
            speedup=speedup,
            latency_ms=latency_ms,
            heads=heads,
            queries=queries,
            neurons=neurons,
            layers=layers,
            sublayers=sublayers,
            parameters=parameters,
            channels=channels,
            macs=macs,
            minimum_channels=minimum_channels,
            multiple_of=multiple_of,
            whole=whole or "",
            layer_shares=layer_shares or "",
            by_sensitivity=by_sensitivity,
            mirrored=mirrored,
            weights=weights,
            mean=mean,
            std=std,
            size=size,
            criterion=(criterion or "").replace("-", "_"),
            depth_criterion=depth_criterion.replace("-", "_"),
            ranking=ranking,
            protect=protect,
            minimum_heads=minimum_heads,
            minimum_neurons=minimum_neurons,
            rounds=rounds,
            schedule=schedule,
            recover=recover,
            lora=lora,
            steps=steps,
            target=target or "",
            uniform=uniform,
            tokens=tokens,
            minutes=minutes,
            confidence=confidence,
            seed=seed,
            threads=threads,
            max_length=max_length,
            progress=progress,
        )
    return _output.show_run(bundle.report(), as_json=json)


@app.command()
def validate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder that prune wrote.")],
    *,
    eval: Annotated[
        str, typer.Option("--eval", metavar="FILE", help="Examples to judge by.", rich_help_panel=options.DATA)
    ],
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    pair_column: options.PairColumn = None,
    score_column: options.ScoreColumn = None,
    max_drop: options.SameMaxDrop = None,
    confidence: options.SameConfidence = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The dense model; by default where it was when it was pruned.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    weights: options.Weights = None,
    threads: options.SameThreads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Prove the claim of BUNDLE again on this machine: quality, speed, and parity of its files."""
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.validate(
            bundle,
            eval=eval,
            text_column=text_column,
            label_column=label_column,
            pair_column=pair_column,
            score_column=score_column,
            reference=reference,
            weights=weights,
            threads=threads,
            confidence=confidence,
            max_drop=max_drop,
            seed=seed,
            progress=progress,
        )
    if not facts.get("accepted"):
        raise GateFailed(str(facts.get("verdict") or f"{bundle} does not hold on this machine"), result=facts)
    return _output.show_run(facts, as_json=json)


@app.command()
def bench(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, or a bundle: what is compared against.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A model, or a bundle.")],
    *,
    eval: options.BenchEval = None,
    text_column: options.TextColumn = None,
    target: Annotated[
        options.TargetName | None,
        typer.Option(
            "--target",
            help="The runtime; by default the one a bundle was made for, and for a model the fastest.",
            rich_help_panel=options.TARGET,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Texts per batch.", rich_help_panel=options.RUN)
    ] = 64,
    weights: options.Weights = None,
    size: options.PictureSize = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:
    """Time A and B side by side, in turn, with intervals."""
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.bench(
            a,
            b,
            eval=eval,
            text_column=text_column,
            target=target,
            weights=weights,
            size=size,
            threads=threads,
            batch_size=batch_size,
            progress=progress,
        )
    from paredown.report import terminal

    table = terminal.bench_table(facts["rows"], against=facts.get("speedup_against"), items=facts.get("items", "texts"))
    return _output.finished(facts, table, as_json=json)


@app.command("inspect")
def inspect_(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder that prune wrote.")],
    *,
    json: options.Json = False,
) -> int:
    """Show what is inside BUNDLE: task, target, widths per layer, figures, files."""
    with shown():
        from paredown import bundle as bundles
        from paredown.cli import _inspect

        facts = _inspect.facts(bundles.load(bundle))
    return _output.finished(facts, _inspect.tables(facts), as_json=json)


@app.command()
def demo(
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="The folder to work in.", rich_help_panel=options.RUN)
    ] = "paredown-demo",
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes", metavar="N", help="Training time of the pruned model.", rich_help_panel=options.BUDGET
        ),
    ] = 0.5,
    json: options.Json = False,
) -> int:
    """Run the whole job on a support desk made on the spot: under five minutes on two cores, without network."""
    with shown(resumable=True) as progress:
        from paredown import demo as desk

        bundle = desk.run(out, minutes=minutes, progress=progress)
    return _output.show_run(bundle.report(), as_json=json)


for _verb in (_studies.score, _studies.sensitivity, _studies.compare, _fewshot.fewshot, _sparsify.sparsify):
    app.command()(_verb)
app.command("bench-sparse")(_bench_sparse.bench_sparse)
app.add_typer(_tokens.app, name="tokens")
app.add_typer(_embedder.app)
