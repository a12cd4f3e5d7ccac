"""What computing on no padding gains: dense against packed, the same texts, in turn, and how far answers differ.

Texts come in batches of 64 in the order of the file, as a server would get them, or sorted by length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH, TURNS = 64, 7
TEXTS, TOKENS = 512, 48_000  # of a file, whichever is less
LONGEST = 256


def measure(model: str, files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The record: per file and order the ratio of times with its interval, and the largest difference of an output."""
    import torch

    from paredown.cores import cores
    from paredown.encoder import Encoder
    from paredown.models import load_model
    from paredown.pipeline._prepare import describe_loaded
    from paredown.tasks import pad, text_classification, tokenize
    from paredown.tokens import Packed

    torch.set_num_threads(cores())
    loaded = load_model(model)
    encoder = Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)
    packed = Packed(encoder)
    rows = []
    for name, path in files:
        data, _ = text_classification.load_named(path)
        order = np.random.default_rng(0).permutation(len(data))[:TEXTS]
        texts = [data.texts[i] for i in order]
        tokens = tokenize(loaded.tokenizer, texts, max_length=LONGEST, input_names=encoder.input_names)
        count = max(BATCH, int(np.searchsorted(np.cumsum(tokens.lengths), TOKENS))) // BATCH * BATCH
        for kind in ("as they come", "sorted"):
            chosen = np.arange(count)
            chosen = chosen if kind == "as they come" else chosen[np.argsort(tokens.lengths[:count], kind="stable")]
            batches = [
                pad([tokens.ids[i] for i in at], pad_id=tokens.pad_id, input_names=tokens.input_names)
                for at in np.split(chosen, count // BATCH)
            ]
            rows.append({"data": name, "order": kind, "texts": count, **_compared(encoder, packed, batches)})
    return {"model": Path(model).name, "batch": BATCH, "rows": rows}


def _compared(encoder: Any, packed: Any, batches: Sequence[Any]) -> dict[str, Any]:
    import torch

    from paredown.calibration import tensors

    inputs = [tensors(batch, encoder) for batch in batches]
    times: dict[str, list[float]] = {"dense": [], "packed": []}
    answers: dict[str, Any] = {}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for name, network in (("dense", encoder), ("packed", packed)):
                begun = time.perf_counter()
                answers[name] = torch.cat([network(**one) for one in inputs])
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - begun)
    ratios = np.array(times["dense"]) / np.array(times["packed"])
    real = sum(int(one["attention_mask"].sum()) for one in inputs)
    return {
        "speedup": {"value": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())},
        "padding": 1 - real / sum(one["attention_mask"].numel() for one in inputs),
        "largest_difference": float((answers["dense"] - answers["packed"]).abs().max()),
    }
