"""A process that loads one alternative and times it when told to; started by `timing`, it imports little.

Messages on both pipes: 8 bytes of length, then an .npz archive without pickles whose entry "header" is JSON.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from paredown.types import Array


def send(stream: BinaryIO, header: Mapping[str, Any], batches: Sequence[Mapping[str, Array]] = ()) -> None:
    """Writes one message."""
    buffer = io.BytesIO()
    arrays = {f"{i}:{name}": array for i, batch in enumerate(batches) for name, array in batch.items()}
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    body = buffer.getvalue()
    stream.write(len(body).to_bytes(8, "little") + body)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], list[dict[str, Array]]]:
    """The next message: its header and its batches. Raises EOFError when the other side is gone."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    body = stream.read(int.from_bytes(size, "little"))
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        batches: dict[int, dict[str, Array]] = {}
        for key in archive.files:
            index, _, name = key.partition(":")
            if name:
                batches.setdefault(int(index), {})[name] = archive[key]
    return header, [batches[i] for i in sorted(batches)]


def main() -> None:
    """Serves until told to stop or until the parent is gone."""
    # Whatever the libraries print must not get between the messages.
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    header, batches = receive(commands)
    module, _, function = header["loader"].partition(":")
    load = getattr(importlib.import_module(module), function)
    runner = load(header["path"], threads=header["threads"], **header["options"])
    send(answers, {"ready": True})
    while True:
        try:
            command, _ = receive(commands)
        except EOFError:
            break
        seconds = np.zeros(command["stop_at"] - command["start_at"])
        for i, batch in enumerate(batches[command["start_at"] : command["stop_at"]]):
            start = time.perf_counter()
            runner.run(batch)
            seconds[i] = time.perf_counter() - start
        send(answers, {}, [{"seconds": seconds}])
    runner.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the parent shows the last line of stderr, so it must be a whole sentence
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
