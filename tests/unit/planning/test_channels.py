"""Which channels stay."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.planning import channel_plan
from paredown.types import Budget, GraphAnatomy, Group, Limits, Scores


def anatomy(*units: int) -> GraphAnatomy:
    return GraphAnatomy("traced", "f", tuple(Group(f"g{i}", "channel", count) for i, count in enumerate(units)))


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_channels_of_the_same_score_go_evenly(ranking: str) -> None:
    found = anatomy(8, 16)
    scores = Scores("s", {"g0": np.ones(8), "g1": np.ones(16)})
    keep = channel_plan(found, scores, Budget("channels", 0.5), [], ranking=ranking).keep
    assert {name: len(units) for name, units in keep.items()} == {"g0": 4, "g1": 8}


def test_one_threshold_parts_all_groups() -> None:
    scores = Scores("s", {"g0": np.arange(8.0), "g1": np.arange(16.0) + 4})
    keep = channel_plan(anatomy(8, 16), scores, Budget("channels", 0.5), []).keep
    assert keep == {"g0": (7,), "g1": tuple(range(5, 16))}  # at 9 and above, but for the one that stays


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_coarse_steps_leave_nothing_of_the_budget_that_would_hold_another(ranking: str) -> None:
    rng = np.random.default_rng(0)
    sizes = (16, 24, 40, 64, 32)
    scores = Scores("s", {f"g{i}": rng.random(count) * (i + 1) for i, count in enumerate(sizes)})
    for share in (0.4, 0.55, 0.7, 0.85):
        plan = channel_plan(
            anatomy(*sizes), scores, Budget("channels", share), [], Limits(multiple_of=8), ranking=ranking
        )
        kept = [len(plan.keep[f"g{i}"]) for i in range(len(sizes))]
        assert share * sum(sizes) - 8 < sum(kept) <= share * sum(sizes)
        assert not any(count % 8 for count in kept)
