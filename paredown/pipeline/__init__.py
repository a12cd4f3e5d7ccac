"""The whole job in one call: the only folder that knows the order of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.bundle import Bundle
from paredown.networks import LoadedNetwork
from paredown.pipeline._bench_sparse import bench_sparse
from paredown.pipeline._embedder import EmbedderSettings, distill_embedder, train_embedder
from paredown.pipeline._fewshot import fewshot
from paredown.pipeline._run import run
from paredown.pipeline._settings import Progress, Settings, Silent
from paredown.pipeline._study import compare, score_model, sensitivity
from paredown.pipeline._study_settings import StudySettings
from paredown.pipeline._token_search import SearchSettings, search_tokens
from paredown.pipeline._tokens import TokenSettings, sweep_tokens
from paredown.pipeline._validate import bench, validate

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "EmbedderSettings",
    "Progress",
    "SearchSettings",
    "Settings",
    "Silent",
    "StudySettings",
    "TokenSettings",
    "bench",
    "bench_sparse",
    "compare",
    "distill_embedder",
    "fewshot",
    "prune",
    "run",
    "score_model",
    "search_tokens",
    "sensitivity",
    "sparsify",
    "sweep_tokens",
    "train_embedder",
    "validate",
]


def prune(
    model: str | nn.Module,
    *,
    data: str,
    eval: str | None = None,
    out: str,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    pair_column: str | None = None,
    score_column: str | None = None,
    max_drop: float | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    heads: float = 0.0,
    queries: float = 0.0,
    neurons: float = 0.0,
    layers: float = 0.0,
    sublayers: float = 0.0,
    parameters: float | None = None,
    criterion: str = "",
    depth_criterion: str = "removal_loss",
    ranking: str = "global",
    protect: int | None = None,
    minimum_heads: int = 1,
    minimum_neurons: int = 1,
    rounds: int = 1,
    schedule: str = "cubic",
    recover: str = "distill",
    lora: int = 0,
    steps: int | None = None,
    target: str = "",
    uniform: bool = False,
    tokens: str | None = None,
    minutes: float = 20.0,
    confidence: float = 0.9,
    seed: int = 0,
    threads: int | None = None,
    max_length: int | None = None,
    weights: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | None = None,
    channels: float = 0.0,
    macs: float | None = None,
    minimum_channels: float = 0.1,
    multiple_of: int | None = None,
    whole: str = "",
    layer_shares: str = "",
    by_sensitivity: bool = False,
    mirrored: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """A smaller, faster, proven model as a bundle at `out`; `.report()` gives the facts.

    Scores, plans to a measured time, cuts, re-fits, distils for `minutes` in total, and takes the fastest candidate,
    the boring ones included, whose drop on the guardrail texts is within `max_drop` (0.01 unless another dial is set)
    at `confidence`. `speedup` is against the fastest dense fp32 alternative; `latency_ms` is the median of one text.

    Or it takes what is asked for away: shares (0.25) or numbers (2) of `heads`, `queries`, `neurons`, `layers` and
    `sublayers`, or as many heads and neurons as leave a share of all `parameters`; at once or in `rounds`. That is how
    language models are pruned. See `Settings` for the rest.

    An image classifier is a folder of transformers, "package.module:factory" with its `weights`, or a module; its
    amounts are a share of the `channels` that goes, or of the `macs` or `parameters` that stays.

    Raises GateFailed when no candidate passed (the closest is at `out`, marked as not accepted), InfeasibleBudget
    with the closest reachable speed, UnsupportedModel and BadData before any long work. A run that was stopped goes on
    where it was when called again with the same arguments.
    """
    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "progress"}
    network = None
    if not isinstance(model, str | Path):
        network = LoadedNetwork(type(model).__name__, model)
        arguments["model"] = network.source
    for name in ("model", "data", "eval", "out", "tokens", "weights"):  # paths are welcome too
        arguments[name] = None if arguments[name] is None else str(arguments[name])
    return run(Settings(**arguments), progress or Silent(), network=network)


def sparsify(
    model: str,
    *,
    data: str,
    eval: str | None = None,
    out: str,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    solver: str = "sparsegpt",
    allocation: str = "uniform",
    permute: bool = False,
    rounds: int = 1,
    schedule: str = "cubic",
    recover: str = "distill",
    heads: float = 0.0,
    queries: float = 0.0,
    neurons: float = 0.0,
    layers: float = 0.0,
    sublayers: float = 0.0,
    parameters: float | None = None,
    criterion: str = "",
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    pair_column: str | None = None,
    score_column: str | None = None,
    max_drop: float | None = None,
    target: str = "",
    steps: int | None = None,
    minutes: float = 20.0,
    confidence: float = 0.9,
    seed: int = 0,
    threads: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """A model with zeros as a bundle at `out`: a share of `sparsity` of its layers' weights, where `pattern` has them.

    Amounts (`heads` to `parameters`) are cut first, as `prune` does. Then `solver` zeroes, at once or in `rounds` by
    the `schedule`, each followed by training that keeps the zeros, `minutes` in all. The bundle serves from our own
    engine ("sparse_cpu") unless another `target` is named, its weights stored without the zeros.

    Raises as `prune`; MissingExtra without numba.
    """
    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "progress"}
    for name in ("model", "data", "eval", "out"):
        arguments[name] = None if arguments[name] is None else str(arguments[name])
    return run(Settings(**arguments), progress or Silent())
