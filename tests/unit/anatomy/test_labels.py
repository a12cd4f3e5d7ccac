"""Rules are met by the names of operators, those that begin with an underscore too."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from paredown.anatomy import describe_graph
from paredown.anatomy._labels import RULES
from paredown.graph import operator_of, trace
from paredown.surgery import cut_graph, mask_graph
from paredown.types import Plan

aten = torch.ops.aten


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(aten._unsafe_view.default(self.one(x), [-1, 6 * 4 * 4]))
        return out


def traced() -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    return trace(Viewed().double(), x), x


def test_a_view_that_is_not_checked_is_followed() -> None:
    model, x = traced()
    assert "_unsafe_view" in {operator_of(node) for node in model.graph.nodes if node.op == "call_function"}
    anatomy = describe_graph(model)
    plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "one": (0, 2, 5)})
    small = cut_graph(model, anatomy, plan)
    assert tuple(small.get_parameter("two.weight").shape) == (5, 3 * 4 * 4)
    torch.testing.assert_close(small(x), mask_graph(model, anatomy, plan)(x))


def test_an_operator_without_a_rule_keeps_what_it_reads() -> None:
    """Also one that is called as a helper of the rules is."""
    assert not {"keep", "read", "lone", "step", "resize", "biased"} & RULES.keys()
    model, _ = traced()
    node = next(node for node in model.graph.nodes if operator_of(node) == "_unsafe_view")
    node.target = aten.view_copy.default  # a view by another name, which nothing is known of
    anatomy = describe_graph(model)
    assert not [group for group in anatomy.groups if group.name == "one"]
    assert "view_copy cannot be followed" in anatomy.whole["one.weight"]
