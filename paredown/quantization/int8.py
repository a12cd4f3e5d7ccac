"""ONNX Runtime int8. Dynamic: int8 weights, activations quantized while the model runs, no calibration data needed.
Static, for networks of convolutions: the ranges of activations are taken from calibration data.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paredown.errors import MissingExtra, ParedownError
from paredown.types import Array

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def quantize(onnx_in: Path, onnx_out: Path, *, reduce_range: bool | None = None, embeddings: bool = True) -> Path:
    """`onnx_out`, written: the model with int8 linear maps (one scale per output) and int8 embedding tables.

    `reduce_range` uses 7 bits of the weights. By default this CPU decides: AVX2 without VNNI adds pairs of products
    in 16 bits, which 8-bit weights overflow (onnxruntime's documentation, "when and why do I need to try U8U8").
    A file made with 8 bits for a CPU with VNNI is less accurate on one without; 7 bits are the same everywhere.
    `embeddings` False leaves the tables in float32: the file is larger, and neither faster nor slower.

    Activations get one scale per tensor, so a text's result depends a little on the batch it is in.
    Raises ParedownError when the model cannot be quantized, MissingExtra.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error
    onnx_out = Path(onnx_out)
    if not Path(onnx_in).is_file():
        raise ParedownError(f"there is no ONNX file {onnx_in} to quantize")
    with tempfile.TemporaryDirectory(dir=onnx_out.parent, prefix=".int8-") as folder, _quiet():
        bare, written = Path(folder) / "bare.onnx", Path(folder) / "int8.onnx"
        try:
            model = onnx.load(os.fspath(onnx_in))
            if model.graph.value_info:  # shapes guessed by an exporter; they make the quantizer's own inference fail
                model.graph.ClearField("value_info")
                onnx.save(model, os.fspath(bare))
            else:
                bare = Path(onnx_in)
            del model
            quantize_dynamic(
                bare,
                written,
                op_types_to_quantize=["MatMul", "Gemm", *(["Gather"] if embeddings else [])],
                per_channel=True,  # halves the error of the logits (minilm-banking77: rmse 0.55 to 0.23), costs no time
                reduce_range=needs_reduced_range() if reduce_range is None else reduce_range,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # protobuf's, onnx's and onnxruntime's own classes
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ParedownError(f"{onnx_in} cannot be quantized to int8: {reason[0]}") from error
        os.replace(written, onnx_out)
    return onnx_out


def quantize_static(
    onnx_in: Path, onnx_out: Path, batches: Sequence[Mapping[str, Array]], *, reduce_range: bool | None = None
) -> Path:
    """`onnx_out`, written: convolutions and linear maps in int8, with ranges of activations as in these input batches.

    For networks of convolutions, which dynamic int8 does not speed up; batch norm is folded first. `reduce_range` as
    above. Raises ParedownError when the model cannot be quantized, MissingExtra.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from error

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Any:
            return next(self._left, None)

    onnx_out = Path(onnx_out)
    with tempfile.TemporaryDirectory(dir=onnx_out.parent, prefix=".int8-") as folder, _quiet():
        folded, written = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        try:
            quant_pre_process(os.fspath(onnx_in), os.fspath(folded), skip_symbolic_shape=True)
            quantization.quantize_static(
                os.fspath(folded),
                os.fspath(written),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=needs_reduced_range() if reduce_range is None else reduce_range,
            )
        except Exception as error:  # as above
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ParedownError(f"{onnx_in} cannot be quantized to int8: {reason[0]}") from error
        os.replace(written, onnx_out)
    return onnx_out


def needs_reduced_range(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU is an x86 one whose int8 products overflow with 8-bit weights. False where it cannot be told."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), set())
    return bool(flags) and not flags & VNNI


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantizer's log lines and warnings away: it advises a preprocessing that our graphs do not need."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
