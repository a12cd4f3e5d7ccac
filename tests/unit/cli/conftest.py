"""A pipeline that does nothing but note what it was asked, so that only the command line is tested."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

import paredown
from paredown import cli

FACTS = {
    "accepted": True,
    "verdict": "3 times as many texts per second, and the accuracy drop is within 1 point.",
    "target": "onnxruntime",
    "speedup": {"value": 3.0, "low": 2.9, "high": 3.1},
    "speedup_against": "dense openvino",
    "latency_ms_p50": {"dense": 4.0, "pruned": 1.5},
    "texts_per_second": {"dense": 350.0, "pruned": 1050.0},
    "quality_metric": "accuracy",
    "quality_dense": 0.93,
    "quality_pruned": 0.925,
    "drop": {"value": 0.005, "low": -0.001, "high": float("nan")},
    "parameters_dense": 22_700_000,
    "parameters_pruned": 15_000_000,
    "minutes": 1.5,
    "bundle": "slim",
}


@dataclass
class Bundle:
    facts: dict[str, Any]

    def report(self) -> dict[str, Any]:
        return self.facts


@dataclass
class Fake:
    """Every call goes to `calls`; `act` runs before a verb comes back, and may raise."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    act: Callable[[Any], None] = lambda progress: None
    facts: dict[str, Any] = field(default_factory=lambda: dict(FACTS))

    def verb(self, name: str, *, as_bundle: bool) -> Callable[..., Any]:
        def call(*given: Any, progress: Any, **named: Any) -> Any:
            self.calls.append((name, given, named))
            self.act(progress)
            return Bundle(self.facts) if as_bundle else self.facts

        return call

    @property
    def asked(self) -> dict[str, Any]:
        """The keyword arguments of the only call."""
        ((_, _, named),) = self.calls
        return named


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    pipeline, demo = ModuleType("paredown.pipeline"), ModuleType("paredown.demo")
    pipeline.__dict__.update(
        prune=found.verb("prune", as_bundle=True),
        sparsify=found.verb("sparsify", as_bundle=True),
        bench_sparse=found.verb("bench_sparse", as_bundle=False),
        validate=found.verb("validate", as_bundle=False),
        bench=found.verb("bench", as_bundle=False),
        fewshot=found.verb("fewshot", as_bundle=False),
    )
    demo.__dict__.update(run=found.verb("demo", as_bundle=True))
    for name, module in (("pipeline", pipeline), ("demo", demo)):
        monkeypatch.setitem(sys.modules, f"paredown.{name}", module)
        monkeypatch.setattr(paredown, name, module, raising=False)
    return found


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` sets in the environment is gone after the test."""
    for name in (*cli._QUIET, "PAREDOWN_DEBUG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
