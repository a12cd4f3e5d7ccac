"""The subcommand that shows where sparsity begins to pay: bench-sparse."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from paredown.cli import _options as options
from paredown.cli._progress import shown
from paredown.cli._studies import Out, make_folder, shares, show_and_keep
from paredown.errors import ParedownError

WHAT = "What to time"


def bench_sparse(
    *,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="AxB,CxD", help="Matrices: inputs x outputs.", rich_help_panel=WHAT)
    ] = "384x1536,1536x384,768x3072",
    sparsity: Annotated[
        str, typer.Option("--sparsity", metavar="A,B", help="Shares of zeros: .5,.9 or 50%,90%.", rich_help_panel=WHAT)
    ] = ".5,.6,.7,.8,.9,.95",
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            metavar="A,B",
            help="unstructured, or blocks such as 4x1 (outputs x inputs).",
            rich_help_panel=WHAT,
        ),
    ] = "unstructured,4x1",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, metavar="N", help="Tokens multiplied at once.", rich_help_panel=WHAT)
    ] = 1024,
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(
            "--device", help="Ours runs on the CPU; on a GPU torch's CSR and 2:4 are timed.", rich_help_panel=WHAT
        ),
    ] = "cpu",
    rounds: Annotated[
        int, typer.Option("--rounds", min=3, metavar="N", help="Turns of every engine.", rich_help_panel=options.RUN)
    ] = 9,
    out: Out = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Show from which sparsity on a matrix is multiplied faster than dense on this machine: torch, CSR, our engine."""
    wanted, values = _sizes(sizes), shares(sparsity)
    make_folder(out)
    with shown() as progress:
        from paredown import pipeline

        facts = pipeline.bench_sparse(
            wanted,
            sparsities=values,
            patterns=[name.strip() for name in pattern.split(",") if name.strip()],
            tokens=tokens,
            device=device,
            threads=threads,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
    from paredown.report import bench_sparse as report

    return show_and_keep(facts, "bench-sparse", out, json, table=report.table, page=report.write)


def _sizes(text: str) -> list[tuple[int, int]]:
    """The pairs that "384x1536,1536x384" means."""
    found = []
    for said in filter(None, (part.strip() for part in text.lower().split(","))):
        pair = re.fullmatch(r"(\d+)x(\d+)", said)
        if pair is None or "0" in (pair[1].lstrip("0") or "0", pair[2].lstrip("0") or "0"):
            raise ParedownError(f"{said!r} is not a size: write inputs x outputs, such as 384x1536")
        found.append((int(pair[1]), int(pair[2])))
    return found
