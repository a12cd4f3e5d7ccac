"""Runners for worker processes: named in `Alternative.loader`, called with a path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paredown.types import Array, Plan, Runner

ONNX = "paredown.targets.onnxruntime:load"
OPENVINO = "paredown.targets.openvino:load"
STOCK = "paredown.pipeline._loaders:stock_torch"
CUT = "paredown.pipeline._loaders:cut_torch"
GRAPH = "paredown.targets:load_graph"
TORCH = "paredown.bundle:torch_runner"
EMBEDDER = "paredown.pipeline._loaders:embedder"
WITH_OWN_INPUTS = "paredown.pipeline._loaders:with_own_inputs"


def stock_torch(path: str, *, threads: int, task: str | None = None) -> Runner:
    """The dense model's own forward pass on torch."""
    from paredown.models import load_model, with_fused_attention
    from paredown.network import network
    from paredown.pipeline._prepare import describe_loaded
    from paredown.targets import stock_runner

    loaded = load_model(path, task=task)
    model = with_fused_attention(loaded.model)  # as transformers itself would
    return stock_runner(network(model, describe_loaded(loaded, model).layout), threads=threads)


def cut_torch(
    path: str,
    *,
    threads: int,
    plan: str,
    task: str | None = None,
    weights: str | None = None,
    policy: str | None = None,
    tensors: str | None = None,
    precision: str = "fp32",
    target: str = "torch",
) -> Runner:
    """The dense model at `path`, folded and cut by a plan (as JSON), on torch or sparse_cpu; with other weights if
    given, and on torch with tokens dropped by a policy (as JSON) and its tensors, the latter in bf16 too.

    A language model runs as transformers runs it.
    """
    from safetensors.torch import load_file

    from paredown.encoder import Encoder
    from paredown.models import CAUSAL_LM, load_model
    from paredown.network import network
    from paredown.pipeline._prepare import describe_loaded
    from paredown.surgery import cut, fold
    from paredown.targets import sparse_cpu, stock_runner
    from paredown.targets.torch import load_encoder
    from paredown.tokens import Packed
    from paredown.types import TokenPolicy

    loaded = load_model(path, task=task)
    model, _ = fold(loaded.model, describe_loaded(loaded, loaded.model))
    anatomy = describe_loaded(loaded, model)
    small = cut(model, anatomy, Plan.from_json(plan))
    if weights is not None:
        load_state(small, load_file(weights))
    if loaded.task == CAUSAL_LM:
        return stock_runner(network(small, anatomy.layout), threads=threads)
    if target == "sparse_cpu":
        return sparse_cpu.load_encoder(Encoder(small, anatomy.layout), threads=threads)
    if policy is None:
        return load_encoder(network(small, anatomy.layout), threads=threads)
    learnt = load_file(tensors) if tensors is not None else {}
    packed = Packed(Encoder(small, anatomy.layout), TokenPolicy.from_json(policy), learnt)
    return load_encoder(packed, threads=threads, precision=precision)


def embedder(path: str, *, threads: int) -> Runner:
    """Sentence embeddings by the model or bundle at `path`; see `_embedders`."""
    from paredown.pipeline._embedders import open_embedder

    return open_embedder(path, threads=threads).runner


@dataclass(frozen=True)
class _OwnInputs:
    """A runner that is fed with the arrays whose names end in `suffix`."""

    runner: Runner
    suffix: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        own = {name: array for name, array in inputs.items() if name.endswith(self.suffix)}
        return self.runner.run({name.removesuffix(self.suffix): array for name, array in own.items()})

    def close(self) -> None:
        self.runner.close()


def with_own_inputs(path: str, *, threads: int, loader: str, suffix: str) -> Runner:
    """The runner of another loader, fed with arrays of its own: models with other vocabularies are timed on the same
    texts.
    """
    module, _, function = loader.partition(":")
    runner: Runner = getattr(importlib.import_module(module), function)(path, threads=threads)
    return _OwnInputs(runner, suffix)


def load_state(model: Any, state: Mapping[str, Any]) -> None:
    """Puts the tensors back; every one must be there."""
    from paredown.encoder import admit_biases

    admit_biases(model, state)
    model.load_state_dict(state, strict=True)
