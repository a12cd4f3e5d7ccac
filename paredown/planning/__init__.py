"""Which units stay. A new allocator is one file with `allocate(anatomy, scores, budget, limits, costs)`; numpy only."""

from __future__ import annotations

from paredown import registry
from paredown.planning._channels import ChannelCosts, Product, aligned_plan, channel_plan
from paredown.planning._choices import Way, channel_levels, choose, plan_of, ways_of
from paredown.planning._costs import Costs, arithmetic, error_of_width, infeasible
from paredown.planning._latency import LatencyTable, Widths, fit_latency, latency_costs, latency_probes
from paredown.planning._rounds import lifted, relative
from paredown.planning._shares import RANKINGS, SCHEDULES, Shares, by_shares, collapse_warnings, gone_by
from paredown.types import Anatomy, Budget, Limits, Plan, Scores

__all__ = [
    "RANKINGS",
    "SCHEDULES",
    "ChannelCosts",
    "Costs",
    "LatencyTable",
    "Product",
    "Shares",
    "Way",
    "Widths",
    "aligned_plan",
    "arithmetic",
    "by_shares",
    "channel_levels",
    "channel_plan",
    "choose",
    "collapse_warnings",
    "error_of_width",
    "fit_latency",
    "gone_by",
    "infeasible",
    "latency_costs",
    "latency_probes",
    "lifted",
    "plan",
    "plan_of",
    "relative",
    "ways_of",
]


def plan(
    anatomy: Anatomy,
    scores: Scores,
    budget: Budget,
    limits: Limits | None = None,
    *,
    allocator: str | None = None,
    costs: Costs | None = None,
) -> Plan:
    """The plan that keeps `budget.keep` of the dense cost at the least loss of score.

    `costs` are needed for latency (a measured table, see `latency_costs`); params and macs are counted. The
    allocator is by default "knapsack", or "uniform" when the limits ask for it. Raises InfeasibleBudget, whose
    `closest` is the least cost that can be reached, in the unit of the costs.
    """
    limits = limits or Limits()
    if costs is None:
        if budget.metric == "latency":
            raise ValueError("a latency budget needs the measured costs of this machine: pass costs=")
        costs = arithmetic(anatomy, budget.metric)
    name = allocator or ("uniform" if limits.uniform else "knapsack")
    allocate = registry.find("planning", name).allocate
    keep = allocate(anatomy, scores, budget.keep * costs.dense, limits, costs)
    return Plan(anatomy.fingerprint, keep, source=f"{scores.criterion} by {name}, {budget.metric} {budget.keep:.4g}")
