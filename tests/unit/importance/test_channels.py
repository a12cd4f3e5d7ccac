"""What scores of channels say of a network that is made for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from paredown.anatomy import describe_graph
from paredown.errors import BadData
from paredown.graph import trace
from paredown.importance import score_channels


@pytest.mark.parametrize("criterion", ["obs", "fisher", "taylor_gate"])
def test_places_that_see_the_same_count_together(criterion: str) -> None:
    """A picture of one colour is the same to a network of pointwise convolutions and a mean, whatever its size."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module = nn.Sequential(*parts, nn.Linear(10, 4)).eval()
    colours = torch.rand(64, 3, 1, 1)
    found = []
    for size in (1, 4):
        x = colours.expand(-1, -1, size, size).contiguous()
        model = trace(module, x)
        found.append(score_channels(model, describe_graph(model), criterion, [x]).values)
    for name, values in found[0].items():
        np.testing.assert_allclose(values, found[1][name], rtol=1e-2, err_msg=name)


def test_progress_is_told_of_every_picture() -> None:
    model = trace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()), torch.rand(2, 3, 6, 6)
    )
    told: list[int] = []
    score_channels(model, describe_graph(model), "fisher", torch.rand(7, 3, 6, 6).split(3), progress=told.append)
    assert told == [3, 3, 1]


def test_a_layer_too_wide_to_invert_is_named() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 30 * 30, 3)).eval()
    x = torch.rand(2, 3, 30, 30)
    model = trace(module, x)
    with pytest.raises(BadData, match=r"a layer of 7200: take taylor_gate"):
        score_channels(model, describe_graph(model), "obs", [x])
    assert score_channels(model, describe_graph(model), "taylor_gate", [x]).values
