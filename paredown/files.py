"""Files that appear whole or not at all, and what goes into them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to: it takes the place of `path` when the block ends well, and goes otherwise."""
    beside = path.with_name(f"{path.name}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # of a folder that is gone or cannot be written to: the block has said so
            beside.unlink(missing_ok=True)


def state_of(model: Any) -> dict[str, Any]:
    """A model's tensors by name, each its own copy, as safetensors wants them."""
    return {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
