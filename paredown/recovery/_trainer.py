"""What every training on transformers' Trainer needs around it: notes on disk, and a process left as it was."""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paredown.files import replacing


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Trainer seeds the generators of the process: afterwards they are as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Silences what is no matter of the user's: nothing to pin, a config that is no file, an old name asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", category=UserWarning, module="peft.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def usual(folder: Path, steps: int, *, seed: int) -> dict[str, Any]:
    """The settings that all trainings share: a cosine schedule with 10 % warm-up, the state of the lowest loss kept,
    no word to anybody, and bfloat16 where there is a GPU that has it.
    """
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "seed": seed,
    }


def read_notes(folder: Path) -> dict[str, Any]:
    """What `remember` wrote beside the checkpoints; empty where nothing was."""
    path = folder / "training.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def remember(folder: Path, facts: dict[str, Any]) -> None:
    """Writes how far a training is beside its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "training.json") as beside:
        beside.write_text(json.dumps(facts))
