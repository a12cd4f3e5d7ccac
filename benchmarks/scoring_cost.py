"""What scoring costs: seconds of each criterion over those of plain passes over the same texts, in one process."""

from __future__ import annotations

import csv
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = 1600  # about what a run scores with
DIFFERENT = TEXTS // 4  # of them: more would be longer ones too, and memory is that of the largest batch
REPEATS = 2
UNITS = ("head", "neuron", "layer")  # sub-layers are as much again, for criteria that try removals


def measure(model: str, data: str) -> dict[str, Any]:
    """The record: per criterion its cost in forward passes, and in passes forward and back; peak memory by texts."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        rows = pool.apply(_costs, (model, data))
        memory = {str(texts): pool.apply(_peak_mib, (model, data, texts)) for texts in (TEXTS // 4, TEXTS, 4 * TEXTS)}
    return {"model": Path(model).name, "rows": rows, "texts": TEXTS, "units": UNITS, "peak_memory_mib_by_texts": memory}


def _costs(model: str, data: str) -> list[dict[str, Any]]:
    from paredown import registry
    from paredown.importance import score_each

    loaded, anatomy, batches = _prepared(model, data, TEXTS)
    names = registry.available("importance")
    times: dict[str, list[float]] = {}
    _plain_pass(loaded.model, anatomy, batches, back=True)  # warms up
    for _ in range(REPEATS):
        for name in ("forward", "both", *names):
            begun = time.perf_counter()
            if name in names:
                score_each(loaded.model, anatomy, batches, [name], units=UNITS)
            else:
                _plain_pass(loaded.model, anatomy, batches, back=name == "both")
            times.setdefault(name, []).append(time.perf_counter() - begun)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return [
        {
            "criterion": name,
            "gradients": bool({"gates", "curvature", "weight_gradients", "learned"} & set(_needs(name))),
            "forward_passes": seconds[name] / seconds["forward"],
            "forward_backward_passes": seconds[name] / seconds["both"],
        }
        for name in names
    ]


def _needs(name: str) -> tuple[str, ...]:
    from paredown import registry

    needs: tuple[str, ...] = registry.find("importance", name).NEEDS
    return needs


def _plain_pass(model: Any, anatomy: Any, batches: Sequence[Any], *, back: bool) -> None:
    """The forward pass of transformers, with the backward pass to every weight if asked for."""
    import torch

    from paredown.calibration import tensors
    from paredown.network import network

    encoder = network(model, anatomy.layout)
    model.requires_grad_(back)
    with torch.set_grad_enabled(back):
        for batch in batches:
            output = model(**tensors(batch, encoder)).logits
            if back:
                output.logsumexp(-1).sum().backward()
                model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def _prepared(model: str, data: str, count: int) -> tuple[Any, Any, list[Any]]:
    from paredown import describe
    from paredown.models import load_model
    from paredown.network import network
    from paredown.tasks import length_sorted_batches, tokenize

    loaded = load_model(model)
    anatomy = describe(loaded.model)
    names = network(loaded.model, anatomy.layout).input_names
    with Path(data).open(encoding="utf-8", newline="") as file:
        first = [row["text"] for row, _ in zip(csv.DictReader(file), range(min(count, DIFFERENT)), strict=False)]
    texts = [first[i % len(first)] for i in range(count)]
    tokens = tokenize(loaded.tokenizer, texts, max_length=loaded.max_length, input_names=names)
    batches = [arrays for _, arrays in length_sorted_batches(tokens, batch_size=32)]
    return loaded, anatomy, batches


def _peak_mib(model: str, data: str, texts: int) -> int:
    from paredown.importance import score_each

    loaded, anatomy, batches = _prepared(model, data, texts)
    score_each(loaded.model, anatomy, batches, ["fisher", "obs", "taylor", "wanda"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
