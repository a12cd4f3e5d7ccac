"""Modules as ONNX models by torch's exporter, with open dimensions and without its noise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paredown.errors import ParedownError

if TYPE_CHECKING:
    from torch import nn

ROWS = {0: "batch"}
TOKENS = {0: "batch", 1: "length"}


def trace(
    module: nn.Module,
    inputs: Sequence[Any],
    names: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    open_axes: Sequence[Any],
) -> Any:
    """The module as an ONNX model; `open_axes` holds for every input, or tuple of inputs, its open dimensions' names.

    Neither 0 nor 1 may stand in an open dimension of `inputs`: the exporter would take them for constants. Raises
    ParedownError for what it cannot trace.
    """
    import torch

    sizes = {name: torch.export.Dim(name, min=1) for name in ("batch", "length")}

    def shape(axes: Any) -> Any:
        if isinstance(axes, tuple):
            return tuple(shape(one) for one in axes)
        return {axis: sizes[name] for axis, name in axes.items()}

    try:
        with _evaluating(module), quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs),
                input_names=list(names),
                output_names=list(outputs),
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=shape(tuple(open_axes)),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ParedownError(f"torch could not trace this model to ONNX: {reason[-1]}") from error
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces with the paths of the machine that exported
    return model


def prefix(model: Any, start: str, outer: Mapping[str, str]) -> None:
    """Gives every inner name the prefix `start`, in place; a name in `outer` becomes what stands there."""

    def renamed(name: str) -> str:
        return outer.get(name, start + name) if name else name

    for node in model.graph.node:
        node.name = start + node.name
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every part in evaluation mode for a while, so that no dropout is traced."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's prints, warnings and log lines away; what it raises still comes through."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        silence = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
