"""torch on the CPU, eager: the encoder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from paredown.types import Array, Limits, Runner

if TYPE_CHECKING:
    from paredown.network import Forward

LIMITS = Limits(multiple_of=16)  # one AVX-512 register of floats; the same as for ONNX Runtime, so that plans fit all


class _TorchRunner:
    def __init__(self, encoder: Forward):
        self._encoder: Forward | None = encoder

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        encoder = self._encoder
        if encoder is None:
            raise ValueError("this runner is closed")
        with torch.inference_mode():
            out = encoder(*(torch.from_numpy(inputs[name]) for name in encoder.input_names))
        return {encoder.output_name: out.float().numpy()}

    def close(self) -> None:
        self._encoder = None


def load_encoder(encoder: Forward, *, threads: int) -> Runner:
    """A runner of `encoder` in inference mode. Sets torch's number of threads for the whole process.

    The encoder is not copied: bring it into evaluation mode first, and leave it alone while it runs.
    """
    import torch

    torch.set_num_threads(threads)
    return _TorchRunner(encoder)
