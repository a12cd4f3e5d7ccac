"""What the tests of recovery share."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from paredown.recovery import _learning, distill
from tests.unit.recovery.cases import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (distill, _learning):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr(distill, "_half_precision_pays", lambda _: False)
    return found
