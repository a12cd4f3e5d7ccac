"""The dense model as anybody would export it, without Paredown's leaner graph: what a speed-up is measured against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from paredown.errors import MissingExtra, ParedownError
from paredown.files import replacing
from paredown.types import Array, Runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paredown.encoder import Encoder
    from paredown.network import Network


def stock_forward(encoder: Network, inputs: Mapping[str, Any]) -> Any:
    """Logits [B, C] or pooled embeddings [B, D] out of the transformers model's own forward pass.

    Of a language model the logits of the next token after each text of the batch [B, V], as generation asks for them.
    """
    if encoder.layout.pooling == "tokens":
        return encoder.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    output = encoder.model(**inputs)
    if encoder.output_name == "logits":
        return output.logits
    return cast("Encoder", encoder).pool(output.last_hidden_state, inputs["attention_mask"])


def export_stock(encoder: Encoder, path: Path) -> Path:
    """`path`, written by torch's exporter from the model's own forward pass, batch and length left open."""
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
        import torch
        from torch import nn
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error
    from paredown.targets._trace import quiet

    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder.model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            return stock_forward(
                encoder, inputs if token_type_ids is None else inputs | {"token_type_ids": token_type_ids}
            )

    ids = torch.full((2, 7), 5)
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(encoder.input_names)]
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    with quiet():
        try:
            program = torch.onnx.export(
                Stock().eval(),
                inputs,
                input_names=list(encoder.input_names),
                output_names=[encoder.output_name],
                dynamo=True,
                dynamic_shapes=tuple({0: batch, 1: length} for _ in inputs),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ParedownError(f"torch could not export this model to ONNX: {str(error).splitlines()[-1]}") from error
    assert program is not None
    with replacing(Path(path)) as beside:
        program.save(os.fspath(beside))
    return Path(path)


class StockTorch:
    """A runner of the model's own forward pass in inference mode."""

    def __init__(self, encoder: Network):
        self._encoder = encoder

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        feed = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._encoder.input_names}
        with torch.inference_mode():
            return {self._encoder.output_name: stock_forward(self._encoder, feed).float().numpy()}

    def close(self) -> None:
        return None


def stock_runner(encoder: Network, *, threads: int) -> Runner:
    """A runner of the dense model on plain torch. Sets torch's number of threads for the whole process."""
    import torch

    torch.set_num_threads(threads)
    return StockTorch(encoder)
