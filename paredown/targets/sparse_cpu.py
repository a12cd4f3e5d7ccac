"""Our own engine for encoders with zeros in their weights, on the CPU: packed texts, sparse and dense products.

Needs numba: pip install "paredown[sparse]".

Legend: B texts, T tokens, D model width, H heads, P tokens of a panel, O outputs, K inputs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import MissingExtra, ParedownError, UnsupportedModel
from paredown.targets import _lean
from paredown.types import Array, Limits, Runner

if TYPE_CHECKING:
    from paredown.encoder import Encoder

LIMITS = Limits(multiple_of=4)  # four rows of a dense or blocked matrix are multiplied at once
WORTH_TRYING = 0.3  # a share of zeros below which no kernel for sparse matrices has won anywhere
TRIALS = 4  # calls with one thread, and as many with all, before it is settled which are faster
_LOCK = threading.Lock()  # numba's pool of threads runs one parallel loop at a time


def load_encoder(encoder: Encoder, *, threads: int, choose: Callable[[Array], int] | None = None) -> Runner:
    """A runner of `encoder`, whose weights are copied. The first one on a machine compiles for about ten seconds.

    `choose` says of a weight matrix [O, K] how it is stored (`kernels.encoder`: SPARSE, BLOCKS, DENSE); by default
    each is timed in all the ways that its zeros allow, and the fastest taken. Raises UnsupportedModel, MissingExtra.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise MissingExtra("numba", "sparse") from error
    return _SparseRunner(encoder, threads, choose or fastest)


class _SparseRunner:
    def __init__(self, encoder: Encoder, threads: int, choose: Callable[[Array], int]):
        from paredown.kernels import encoder as kernels
        from paredown.kernels.program import Program

        self._kernels = kernels
        self._encoder: Encoder | None = encoder
        self._threads = threads
        self._common = _lean.shared(encoder)
        self._activation = {
            **{"gelu": kernels.GELU, "gelu_new": kernels.GELU_TANH, "gelu_pytorch_tanh": kernels.GELU_TANH},
            **{"relu": kernels.RELU, "silu": kernels.SILU, "swish": kernels.SILU},
        }[self._common.activation]
        width = self._common.width
        if width % 4:
            raise UnsupportedModel(f"the sparse engine takes model widths that are multiples of 4; this one is {width}")
        program, rows, biased = Program(), [], []
        for layer in encoder.layers:
            own = _lean.tensors_of(layer, first_row=False, position_bias=self._common.position_bias)
            missing = {"qkv": (0, width), "out": (width, 0), "up": (0, width), "down": (width, 0)}
            numbers = []
            for name, shape in missing.items():
                weight = own.get(name, np.zeros(shape, np.float32))
                numbers.append(program.matrix(weight, own.get(f"{name}_bias"), choose(weight)))
            norms = [
                program.vector(own[f"{name}.weight"], own[f"{name}.bias"]) for name in ("attention_norm", "ffn_norm")
            ]
            rows.append([*numbers, layer.num_heads, *norms])
            biased.append([int(head) for head in own.get("bias_heads", range(layer.num_heads))])
        self._weights = program.weights(rows, biased)
        outputs = self._weights.matrices[:, kernels.OUT]
        self._widest, self._middle = (
            max(4, int(outputs[self._weights.layers[:, part]].max())) for part in (kernels.QKV, kernels.UP)
        )
        self._norm_constants = np.array([1 / width, self._common.epsilon], dtype=np.float32)
        self._rooms: dict[tuple[int, ...], Any] = {}
        self._tried: dict[tuple[int, int], dict[int, list[float]]] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        encoder = self._encoder
        if encoder is None:
            raise ValueError("this runner is closed")
        with torch.inference_mode():
            ids, types = (inputs.get(name) for name in ("input_ids", "token_type_ids"))
            read = "token_type_ids" in encoder.input_names
            stream = encoder.embed(torch.from_numpy(ids), torch.from_numpy(types) if read else None)
            bias = encoder.position_bias(stream) if self._common.position_bias else torch.zeros(0, 0, 0)
            pooled = self._pooled(
                stream.contiguous().numpy(), np.asarray(inputs["attention_mask"]), bias.contiguous().numpy()
            )
            return {encoder.output_name: encoder.finish(torch.from_numpy(pooled)[:, None]).numpy()}

    def _pooled(self, stream: Array, mask: Array, bias: Array) -> Array:
        """[B, D] of the embedded tokens [B, T, D]: the texts without padding, through the layers, and pooled."""
        kernels, common = self._kernels, self._common
        if (mask[:, 1:] > mask[:, :-1]).any():
            raise ParedownError("the sparse engine takes texts that are padded behind their tokens, not before them")
        counts = mask.sum(1).astype(np.int64)
        taken = -(-counts // kernels.ALIGNED) * kernels.ALIGNED
        starts, total = taken.cumsum() - taken, max(1, int(taken.sum()))
        panel = next((size for size in (16, 32) if total <= size), 64)
        out = np.empty((len(counts), common.width), dtype=np.float32)
        panels = -(-total // panel)
        with _LOCK:
            threads, tried = self._awake(panels, panel)
            begun = time.perf_counter()
            kernels.use_threads(threads)
            room = self._room(panels, panel, int(counts.max()), threads)
            kernels.packed(stream, starts, counts, room.x)
            form = (common.head_dim, self._activation, self._norm_constants, common.first_row)
            kernels.forward(room, self._weights, starts, counts, *form, bias)
            kernels.pooled(room.x, starts, counts, common.first_row, out)
            tried.append(time.perf_counter() - begun)
        return out

    def _awake(self, panels: int, panel: int) -> tuple[int, list[float]]:
        """How many threads to take, and where to note the time: for few tokens waking the others may cost more than
        they save, so the first calls try both. What comes out is the same.
        """
        if panels > self._threads or self._threads == 1:
            return self._threads, []
        tried = self._tried.setdefault((panels, panel), {1: [], self._threads: []})
        least = min(tried, key=lambda threads: len(tried[threads]))
        if len(tried[least]) < TRIALS:
            return least, tried[least]
        return min(tried, key=lambda threads: min(tried[threads])), []

    def _room(self, panels: int, panel: int, longest: int, threads: int) -> Any:
        """Memory for so many panels; that of the last batch is used again where it has the same shape."""
        from paredown.kernels.program import empty

        kernels, width = self._kernels, self._common.width
        key = panels, panel, -(-longest // 64), threads
        if key not in self._rooms:
            self._rooms.clear()
            self._rooms[key] = kernels.Room(
                empty((panels, width, panel)),
                empty((panels, width, panel)),
                empty((panels, self._widest + 4, panel)),
                empty((max(panels if panels < threads else 0, threads), self._middle, panel)),
                empty((threads, kernels.scratch_floats(self._common.head_dim, 64 * key[2]))),
            )
        return self._rooms[key]

    def close(self) -> None:
        self._encoder = None
        self._rooms.clear()


def fastest(weight: Array) -> int:
    """How to store a weight matrix [O, K] so that its product with 64 tokens takes least time on one core, measured."""
    from paredown.kernels import encoder as kernels
    from paredown.kernels.program import Program, empty

    if not weight.size or float((weight == 0).mean()) < WORTH_TRYING:
        return kernels.DENSE
    kinds = [kernels.DENSE, kernels.SPARSE, kernels.BLOCKS]
    program = Program()
    for kind in kinds:
        program.matrix(weight, None, kind)
    weights = program.weights()
    x, y = empty((1, weight.shape[1], 64)), empty((1, len(weight) + 4, 64))
    took = dict.fromkeys(kinds, float("inf"))
    with _LOCK:
        kernels.use_threads(1)
        for turn in range(6):
            for number, kind in enumerate(kinds):
                start = time.perf_counter()
                kernels.product(x, y, weights, number, 1)
                if turn:  # the first one warms up, and may compile
                    took[kind] = min(took[kind], time.perf_counter() - start)
    return min(kinds, key=lambda kind: took[kind])
