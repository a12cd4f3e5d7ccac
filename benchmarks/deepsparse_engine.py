"""DeepSparse 1.8.0 as one of the engines that are timed in turn. It has an environment of its own, which it needs:

python3.11 -m venv ds && ds/bin/pip install deepsparse==1.8.0 "numpy<2" "setuptools<70"
DEEPSPARSE_PYTHON=ds/bin/python scripts/bench sparse-encoder
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

PYTHON = "DEEPSPARSE_PYTHON"  # the environment variable that names that environment's interpreter

SERVER = """
import sys
import numpy as np
from deepsparse import compile_model
path, threads = sys.argv[1], int(sys.argv[2])
engines = {}
for line in sys.stdin:
    batch, length = map(int, line.split())
    if (batch, length) not in engines:
        shape = [[batch, length]] * 3
        engine = compile_model(path, batch_size=batch, num_cores=threads, input_shapes=shape)
        ids = np.random.default_rng(0).integers(5, 20000, (batch, length))
        engines[batch, length] = engine, [ids, np.ones_like(ids), np.zeros_like(ids)]
    engine, inputs = engines[batch, length]
    engine.run(inputs, val_inp=False)
    print("done", flush=True)
"""


class _DeepSparse:
    """Answers nothing; a call takes as long as the engine does, and 0.05 ms for the pipe."""

    def __init__(self, path: str, threads: int):
        command = [os.environ[PYTHON], "-c", SERVER, path, str(threads)]
        environment = {**os.environ, "NM_DISABLE_ANALYTICS": "1"}
        environment.pop("PYTHONPATH", None)  # with which a worker is led to another environment's packages
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, inputs: Any) -> dict[str, Any]:
        batch, length = inputs["input_ids"].shape
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{batch} {length}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line == "done\n":  # the engine says hello on the same stream
                return {}
        raise RuntimeError(f"DeepSparse ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.terminate()


def load(path: Path | str, *, threads: int) -> _DeepSparse:
    """What the timing calls in a process of its own."""
    return _DeepSparse(str(path), threads)
