"""Which channels stay."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.planning import channel_plan
from paredown.types import Budget, GraphAnatomy, Group, Scores


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
