"""The options that several verbs share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from paredown.cli._values import amount, deviations, figures, picture_size, share
from paredown.errors import BadData, ParedownError

DATA, PICTURES, BUDGET, AMOUNT, TARGET, RUN = (
    "Data",
    "Pictures: image classifiers",
    "Budget",
    "Amount: instead of a speed or a drop",
    "Target",
    "Run",
)  # the panels of --help

TargetName = Literal["onnxruntime", "openvino", "torch"]
SparseTargetName = Literal["sparse_cpu", "onnxruntime", "openvino", "torch"]
TaskName = Literal["text-classification", "text-embedding", "causal-lm", "image-classification"]
Recovery = Literal["none", "compensate", "reconstruct", "distill", "finetune"]
Ranking = Literal["global", "layer"]
Schedule = Literal["linear", "cubic", "exponential"]


def read_config(context: typer.Context, path: str | None) -> str | None:
    """Makes the fields of a TOML file the defaults of the command's options, so that options given win.

    Raises `BadData` when the file cannot be read, or has a key that is no option. A value of the wrong kind is told by
    typer, as if it had been given as an option.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadData(f"{path} is not there; --config names a TOML file of settings") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadData(f"{path} is not a TOML file: {error}") from error
    fields = {p.name: p for p in context.command.params if p.name and p.name not in ("config", "json", "help")}
    for key, value in table.items():
        if key not in fields:
            raise BadData(f"{path}: there is no setting {key!r}; there are {', '.join(fields)}")
        # typer would take the text of a list, or of true, for the name of a file
        if not isinstance(value, bool | int | float | str) or isinstance(value, bool) != _is_switch(fields[key]):
            raise BadData(f"{path}: {key} cannot be {value!r}")
    context.default_map = table
    return path


def _is_switch(parameter: object) -> bool:
    return bool(getattr(parameter, "is_flag", False))


Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="These settings from a TOML file (max_drop = 0.01); options given here win.",
        callback=read_config,
        is_eager=True,
        rich_help_panel=RUN,
    ),
]


def one_dial(
    context: typer.Context, speedup: float | None, latency_ms: float | None
) -> tuple[float | None, float | None]:
    """`speedup` and `latency_ms` with at most one of them set; one given as an option replaces one of --config's.

    Raises `ParedownError` when both come from the same place.
    """
    if speedup is None or latency_ms is None:
        return speedup, latency_ms
    given = [_is_option(context, name) for name in ("speedup", "latency_ms")]
    if given[0] == given[1]:
        raise ParedownError("there is one dial: give --speedup or --latency-ms, not both")
    return (speedup, None) if given[0] else (None, latency_ms)


def _is_option(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="Held-out examples; without it a part of --data is set aside.",
        rich_help_panel=DATA,
    ),
]
Task = Annotated[
    TaskName | None,
    typer.Option("--task", help="What the model does; found out by default.", rich_help_panel=DATA),
]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", metavar="NAME", help="The column of the texts.", rich_help_panel=DATA)
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="The column of the labels.", rich_help_panel=DATA)
]
PairColumn = Annotated[
    str | None,
    typer.Option(
        "--pair-column", metavar="NAME", help="The column of each text's second sentence.", rich_help_panel=DATA
    ),
]
ScoreColumn = Annotated[
    str | None,
    typer.Option(
        "--score-column",
        metavar="NAME",
        help="The column of how similar the two are, in figures.",
        rich_help_panel=DATA,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Of package.module:factory, an image classifier of your own: a safetensors file.",
        rich_help_panel=PICTURES,
    ),
]
Mean = Annotated[
    Any,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        parser=figures,
        help="What pictures / 255 are normalized with, .485,.456,.406; by default what the model's folder says.",
        rich_help_panel=PICTURES,
    ),
]
Std = Annotated[
    Any,
    typer.Option(
        "--std", metavar="R,G,B", parser=deviations, help="And divided by, likewise.", rich_help_panel=PICTURES
    ),
]
PictureSize = Annotated[
    Any,
    typer.Option(
        "--size",
        metavar="HEIGHTxWIDTH",
        parser=picture_size,
        help="What the pictures of a folder are scaled to, 224x224; by default what the model's folder says.",
        rich_help_panel=PICTURES,
    ),
]
BenchEval = Annotated[
    str | None,
    typer.Option("--eval", metavar="FILE", help="Texts to time with; without it random tokens.", rich_help_panel=DATA),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="SHARE",
        parser=share,
        help="The quality that may be lost, 1% or 0.01. The default dial, at 1%; a gate beside the other two.",
        rich_help_panel=BUDGET,
    ),
]
SameMaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="SHARE",
        parser=share,
        help="The quality that may be lost, 1% or 0.01; by default what the run allowed.",
        rich_help_panel=BUDGET,
    ),
]
Heads = Annotated[
    float,
    typer.Option(
        "--heads",
        metavar="AMOUNT",
        parser=amount,
        show_default=False,
        help="25% of the heads, or a number.",
        rich_help_panel=AMOUNT,
    ),
]
Queries = Annotated[
    float,
    typer.Option(
        "--queries",
        metavar="AMOUNT",
        parser=amount,
        show_default=False,
        help="Query heads of every group that shares keys and values (--heads are whole groups then).",
        rich_help_panel=AMOUNT,
    ),
]
Neurons = Annotated[
    float,
    typer.Option(
        "--neurons", metavar="AMOUNT", parser=amount, show_default=False, help="FFN neurons.", rich_help_panel=AMOUNT
    ),
]
Layers = Annotated[
    float,
    typer.Option(
        "--layers", metavar="AMOUNT", parser=amount, show_default=False, help="Whole layers.", rich_help_panel=AMOUNT
    ),
]
Sublayers = Annotated[
    float,
    typer.Option(
        "--sublayers",
        metavar="AMOUNT",
        parser=amount,
        show_default=False,
        help="Attention or FFN of a layer alone.",
        rich_help_panel=AMOUNT,
    ),
]
Parameters = Annotated[
    float | None,
    typer.Option(
        "--parameters",
        metavar="SHARE",
        parser=amount,
        help="What is to be left of all parameters, heads and neurons going as they matter.",
        rich_help_panel=AMOUNT,
    ),
]
Channels = Annotated[
    float,
    typer.Option(
        "--channels",
        metavar="SHARE",
        parser=amount,
        show_default=False,
        help="Of an image classifier: 30% of the channels go.",
        rich_help_panel=AMOUNT,
    ),
]
Macs = Annotated[
    float | None,
    typer.Option(
        "--macs",
        metavar="SHARE",
        parser=amount,
        help="Of an image classifier: what is to be left of the multiply-accumulates.",
        rich_help_panel=AMOUNT,
    ),
]
MinimumChannels = Annotated[
    float,
    typer.Option(
        "--minimum-channels",
        metavar="SHARE",
        parser=amount,
        help="That every layer of an image classifier keeps.",
        rich_help_panel=PICTURES,
    ),
]
MultipleOf = Annotated[
    int | None,
    typer.Option(
        "--multiple-of",
        min=1,
        metavar="N",
        help="Channels stay in multiples of N; by default of 8, which engines like, or of less for an amount.",
        rich_help_panel=PICTURES,
    ),
]
Whole = Annotated[
    str | None,
    typer.Option(
        "--whole",
        metavar="A,B",
        help="Layers whose channels all stay, none for no layer. By default the first one, and residual streams "
        "where an amount is better saved elsewhere.",
        rich_help_panel=PICTURES,
    ),
]
LayerShares = Annotated[
    str | None,
    typer.Option(
        "--layer-shares", metavar="A=50%,B=0", help="What single layers lose instead.", rich_help_panel=PICTURES
    ),
]
BySensitivity = Annotated[
    bool,
    typer.Option(
        "--by-sensitivity",
        help="Share an amount out by what each layer alone loses, as measured; residual branches may go too.",
        rich_help_panel=PICTURES,
    ),
]
Mirrored = Annotated[
    bool,
    typer.Option(
        "--mirrored/--not-mirrored",
        help="Whether a training also shows pictures mirrored: not for digits, letters and signs.",
        rich_help_panel=PICTURES,
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="What ranks heads, neurons and channels: obs, but ablation for a language model's heads.",
        rich_help_panel=AMOUNT,
    ),
]
DepthCriterion = Annotated[
    str, typer.Option("--depth-criterion", metavar="NAME", help="What ranks layers.", rich_help_panel=AMOUNT)
]
HowRanked = Annotated[
    Ranking, typer.Option("--ranking", help="Over all layers, or the same share of each.", rich_help_panel=AMOUNT)
]
Protect = Annotated[
    int | None,
    typer.Option(
        "--protect",
        min=0,
        metavar="N",
        help="First and last layers that stay whole; 2 of a language model (fewer of a short one), else 0.",
        rich_help_panel=AMOUNT,
    ),
]
MinimumHeads = Annotated[
    int,
    typer.Option(
        "--minimum-heads", min=1, metavar="N", help="Heads that a layer keeps if it keeps any.", rich_help_panel=AMOUNT
    ),
]
MinimumNeurons = Annotated[
    int,
    typer.Option("--minimum-neurons", min=1, metavar="N", help="Neurons, likewise.", rich_help_panel=AMOUNT),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=1,
        metavar="N",
        help="Scored, cut and recovered so many times; amounts are of the original model.",
        rich_help_panel=AMOUNT,
    ),
]
HowScheduled = Annotated[
    Schedule, typer.Option("--schedule", help="How much of it goes in which round.", rich_help_panel=AMOUNT)
]
HowRecovered = Annotated[
    Recovery, typer.Option("--recover", help="What follows each cut; the last two train.", rich_help_panel=AMOUNT)
]
Lora = Annotated[
    int,
    typer.Option("--lora", min=0, metavar="RANK", help="Train LoRA matrices of this rank.", rich_help_panel=AMOUNT),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Training steps in all, instead of --minutes.", rich_help_panel=AMOUNT
    ),
]
Minutes = Annotated[
    float,
    typer.Option("--minutes", metavar="N", help="Training time; 0 is training-free.", rich_help_panel=BUDGET),
]
Confidence = Annotated[
    float,
    typer.Option(
        "--confidence",
        metavar="SHARE",
        help="How sure the gate has to be that the drop is within bounds, from 0.5 to below 1.",
        rich_help_panel=BUDGET,
    ),
]
SameConfidence = Annotated[
    float | None,
    typer.Option(
        "--confidence",
        metavar="SHARE",
        help="How sure the gate has to be; by default as the run was.",
        rich_help_panel=BUDGET,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="N",
        help="Cut texts after N tokens; of a language model, the tokens of a window (2048 where it takes as many).",
        rich_help_panel=DATA,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Threads to run with; every core by default.", rich_help_panel=RUN
    ),
]
SameThreads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Threads to run with; by default as the run had.", rich_help_panel=RUN
    ),
]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="The folder of the bundle.", rich_help_panel=RUN)]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="For splits and sampling.", rich_help_panel=RUN)]
Json = Annotated[
    bool, typer.Option("--json", help="The result as one JSON object, the last line of stdout.", rich_help_panel=RUN)
]
