"""Plans of an amount: a share of an image classifier's channels, multiply-accumulates or parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paredown import planning
from paredown.errors import InfeasibleBudget
from paredown.layers import macs, places_of
from paredown.pipeline._network_table import Table
from paredown.surgery import cut_graph, parameters
from paredown.types import Budget, Limits, Plan, Scores

HALVINGS = 12  # of a share: to within a thousandth


@dataclass
class Amounts:
    """Shared out by a ranking of scores, or by what each part alone loses."""

    table: Table

    def plan(self, share: float = 1.0, scores: Scores | None = None) -> Plan:
        """The plan of the amount that was asked for, of which a `share` (0 to 1) is gone by now; by the dense network's
        scores unless there are others.
        """
        settings, scores = self.table.settings, scores or self.table.scores
        metric, stays = "channels", 1 - settings.channels
        if settings.macs is not None:
            metric, stays = "macs", settings.macs
        elif settings.parameters is not None:
            metric, stays = "params", settings.parameters
        budget = Budget(metric, 1 - (1 - stays) * share)
        if settings.by_sensitivity:
            return self._by_sensitivity(budget, scores)
        return self._ranked(budget, scores, self._untouched(Budget(metric, stays)))

    def _ranked(self, budget: Budget, scores: Scores, untouched: Sequence[str]) -> Plan:
        table = self.table
        settings, anatomy = table.settings, table.prepared.anatomy
        products = [planning.Product(name, *about) for name, about in places_of(table.prepared.model).items()]
        how: dict[str, Any] = {
            "ranking": "local" if settings.ranking == "layer" else "global",
            "protect": [name for name in untouched if name not in table.shares],
            "shares": table.shares,
            "minimum": settings.minimum_channels,
        }
        if settings.multiple_of:
            limits = Limits(multiple_of=settings.multiple_of)
            return planning.channel_plan(anatomy, scores, budget, products, limits, **how)
        return planning.aligned_plan(anatomy, scores, budget, products, **how)

    def _untouched(self, budget: Budget) -> tuple[str, ...]:
        """What stays whole under a budget of arithmetic or parameters: also the residual streams, unless it was said
        what stays, where the network then answers more like the dense one.

        Every block reads and writes a stream's channels, and no layer makes up for what they carried: half of the
        arithmetic of cifar10-resnet56 cost 8 points with the streams and 3 without (docs/networks.md).
        """
        table = self.table
        streams = table.prepared.anatomy.streams
        if table.settings.whole or budget.metric == "channels" or {*table.whole, *table.shares}.issuperset(streams):
            return table.whole

        def compute() -> list[str]:
            choices: list[tuple[str, ...]] = [table.whole, (*table.whole, *streams)]
            table.progress.stage("Choosing what stays whole", len(choices))
            found: dict[tuple[str, ...], float] = {}
            for names in choices:
                with contextlib.suppress(InfeasibleBudget):  # told later, where it is so of both
                    found[names] = table.lost(self._ranked(budget, table.scores, names))
                table.progress.advance()
            best = min(choices, key=lambda names: found.get(names, math.inf))
            return list(best)

        return tuple(table.work.json("untouched", compute))

    def _by_sensitivity(self, budget: Budget, scores: Scores) -> Plan:
        """The least error in all for the budget, from what each part costs and loses alone."""
        table = self.table
        model, anatomy = table.prepared.model, table.prepared.anatomy
        count = macs if budget.metric == "macs" else parameters
        whole = count(model)

        def saved() -> list[float]:
            table.progress.stage("Counting what each part is", len(table.keys))
            return [float(whole - count(cut_graph(model, anatomy, table.plan_with([key])))) for key in table.keys]

        stored = dict(zip(table.keys, table.work.json(f"counts-{budget.metric}", saved), strict=True))
        parts = planning.ways_of(anatomy, stored, table.errors)
        low, high = 0.0, sum(max(way.saved for way in part) for part in parts)
        best: Plan | None = None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            plan = planning.plan_of(anatomy, scores, planning.choose(parts, middle), "by sensitivity")
            fits = count(cut_graph(model, anatomy, plan)) <= budget.keep * whole
            low, high, best = (low, middle, plan) if fits else (middle, high, best)
        if best is None:
            narrowest = planning.plan_of(anatomy, scores, planning.choose(parts, low))
            least = count(cut_graph(model, anatomy, narrowest))
            raise planning.infeasible(budget.keep * whole, least)
        return best
