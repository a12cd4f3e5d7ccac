"""torch on the CPU, eager: the encoder as it is, in float32 or in bfloat16 where the CPU has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paredown.cores import has_bfloat16
from paredown.errors import ParedownError
from paredown.types import Array, Limits, Runner

if TYPE_CHECKING:
    from paredown.network import Forward

LIMITS = Limits(multiple_of=16)  # one AVX-512 register of floats; the same as for ONNX Runtime, so that plans fit all


class _TorchRunner:
    def __init__(self, encoder: Forward, precision: str):
        self._encoder: Forward | None = encoder
        self._precision = precision

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        encoder = self._encoder
        if encoder is None:
            raise ValueError("this runner is closed")
        with torch.inference_mode(), autocast(self._precision):
            out = encoder(*(torch.from_numpy(inputs[name]) for name in encoder.input_names))
        return {encoder.output_name: out.float().numpy()}

    def close(self) -> None:
        self._encoder = None


def load_encoder(encoder: Forward, *, threads: int, precision: str = "fp32") -> Runner:
    """A runner of `encoder` in inference mode. Sets torch's number of threads for the whole process.

    The encoder is not copied: bring it into evaluation mode first, and leave it alone while it runs. With "bf16",
    matrix products are in bfloat16 and norms in float32. Raises ParedownError where the CPU has no bfloat16.
    """
    import torch

    check_precision(precision)
    torch.set_num_threads(threads)
    return _TorchRunner(encoder, precision)


def autocast(precision: str) -> Any:
    """The context in which torch computes in that precision ("fp32", "bf16")."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def check_precision(precision: str) -> None:
    """Raises ParedownError for a precision that there is not, or that this CPU would only emulate, slowly."""
    if precision not in ("fp32", "bf16"):
        raise ParedownError(f"torch runs in fp32 or bf16, not in {precision!r}")
    if precision == "bf16" and not has_bfloat16():
        raise ParedownError("this CPU has no bfloat16 instructions, so bf16 would be slower than fp32: leave it out")
