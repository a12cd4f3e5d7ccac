"""What every test shares: the rule for tests/real, a core for each worker, and fixed random seeds."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from paredown.cores import cores

REAL = Path(__file__).parent / "real"


def pytest_configure(config: pytest.Config) -> None:
    # The same examples every time, and no time limit for one: timings are never asserted.
    settings.register_profile("paredown", deadline=None, derandomize=True)
    settings.load_profile("paredown")
    _keep_to_one_core(os.environ.get("PYTEST_XDIST_WORKER", ""))
    torch.set_num_threads(min(2, cores()))
    folder = os.environ.get("PAREDOWN_ASSETS")
    if folder and not Path(folder).is_dir():
        # Skipping here would turn a mistyped path into a green run that proved nothing.
        raise pytest.UsageError(f"PAREDOWN_ASSETS is {folder!r}, which is not a folder")


def _keep_to_one_core(worker: str) -> None:
    """Pins a worker of pytest-xdist, and what it starts: sharing cores, they would wait for each other's threads."""
    if worker.removeprefix("gw").isdigit() and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[int(worker.removeprefix("gw")) % len(own)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="PAREDOWN_ASSETS is not set: it names the folder of real models and data")
    for item in items:
        if item.path.is_relative_to(REAL):
            item.add_marker(pytest.mark.real)
            if not os.environ.get("PAREDOWN_ASSETS"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; only tests under tests/real may ask for it."""
    folder = os.environ.get("PAREDOWN_ASSETS")
    if not folder:
        pytest.fail("only tests under tests/real may use the fixture `assets`")
    return Path(folder).resolve()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
