"""What every traced network must fulfil: a cut computes what the mask computes, written down and read again too."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import fx, nn

from paredown.anatomy import describe_graph
from paredown.graph import from_json, run_seeing, to_json, trace
from paredown.surgery import cut_graph, mask_graph
from paredown.types import GraphAnatomy, Plan
from tests.contracts.networks import NETWORKS, example, network


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def traced(name: str) -> fx.GraphModule:
    case = NETWORKS[name]
    return trace(network(case).double(), example(case).double())


@pytest.fixture(scope="module")
def anatomy(traced: fx.GraphModule) -> GraphAnatomy:
    return describe_graph(traced)


def plan_of(anatomy: GraphAnatomy, seed: int, *, exact: bool = True) -> Plan:
    """A random part of every group's units, one at least of channels."""
    rng = np.random.default_rng(seed)
    keep = anatomy.identity()
    for group in anatomy.groups:
        if group.exact or not exact:
            units = rng.permutation(group.units)[: rng.integers(group.minimum, group.units + 1)]
            keep[group.name] = tuple(sorted(int(unit) for unit in units))
    return Plan(anatomy.fingerprint, keep)


def shape_of(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def pictures(name: str) -> torch.Tensor:
    return example(NETWORKS[name], batch=3).double()


def test_traced_computes_what_the_module_computes(name: str, traced: fx.GraphModule) -> None:
    whole = network(NETWORKS[name]).double()
    x = pictures(name)
    assert torch.equal(traced(x.clone()), whole(x.clone()))


@pytest.mark.parametrize("seed", range(6))
def test_cut_is_mask(name: str, traced: fx.GraphModule, anatomy: GraphAnatomy, seed: int) -> None:
    plan, x = plan_of(anatomy, seed), pictures(name)
    small, masked = cut_graph(traced, anatomy, plan), mask_graph(traced, anatomy, plan)
    torch.testing.assert_close(small(x.clone()), masked(x.clone()), rtol=1e-10, atol=1e-11)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in traced.parameters())


def test_a_branch_goes_alone(name: str, traced: fx.GraphModule, anatomy: GraphAnatomy) -> None:
    """Dropping a branch is the same as adding zeros, and nothing that worked for it alone stays."""
    x = pictures(name)
    for number, branch in enumerate(anatomy.branches):
        stay = tuple(one for one in range(len(anatomy.branches)) if one != number)
        plan = Plan(anatomy.fingerprint, {**anatomy.identity(), "branches": stay})
        small, masked = cut_graph(traced, anatomy, plan), mask_graph(traced, anatomy, plan)
        torch.testing.assert_close(small(x.clone()), masked(x.clone()), rtol=1e-10, atol=1e-11)
        assert not {node.name for node in small.graph.nodes} & {*branch.nodes, branch.join}
        assert not set(branch.weights) & small.state_dict().keys()
        assert {group.name for group in anatomy.groups} >= set(branch.groups)
    assert sum(group.units for group in anatomy.groups if group.kind == "branch") == len(anatomy.branches)


def test_positions_are_distinct(anatomy: GraphAnatomy) -> None:
    seen: set[tuple[str, int, int]] = set()
    for group in anatomy.groups:
        for part in group.slices:
            assert part.positions.shape[0] == group.units
            entries = {(part.tensor, part.axis, int(p)) for p in part.positions.ravel()}
            assert len(entries) == part.positions.size and not entries & seen
            seen |= entries


def test_what_can_go_and_what_stays(name: str, anatomy: GraphAnatomy) -> None:
    case = NETWORKS[name]
    produced = {part.tensor for group in anatomy.groups for part in group.slices if part.role == "producer"}
    assert {f"{layer}.weight" for layer in case.cut} <= produced
    for layer in case.whole:
        assert f"{layer}.weight" not in produced
        assert anatomy.whole[f"{layer}.weight"]


def test_written_and_read_again(name: str, traced: fx.GraphModule, anatomy: GraphAnatomy) -> None:
    plan, x = plan_of(anatomy, 11), pictures(name)
    small = cut_graph(traced, anatomy, plan)
    text = json.dumps(to_json(traced))
    empty: dict[str, torch.Tensor] = {
        key: nn.Parameter(value.detach().to("meta")) for key, value in traced.named_parameters(remove_duplicate=False)
    }
    empty |= {key: value.to("meta") for key, value in traced.named_buffers(remove_duplicate=False)}
    again = from_json(json.loads(text), empty)
    told = describe_graph(again)
    assert told.fingerprint == anatomy.fingerprint and [g.name for g in told.groups] == [g.name for g in anatomy.groups]
    rebuilt = cut_graph(again, told, plan)
    rebuilt.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(rebuilt(x.clone()), small(x.clone()))


def test_a_cut_of_a_cut(name: str, traced: fx.GraphModule, anatomy: GraphAnatomy) -> None:
    """A cut network is one that can be described and cut again."""
    x = pictures(name)
    small = cut_graph(traced, anatomy, plan_of(anatomy, 5))
    smaller, sizes = copy.deepcopy(small), dict[str, tuple[int, ...]]()
    called = {node.name: node.meta["shape"] for node in small.graph.nodes if node.op == "call_function"}
    run_seeing(small, x.clone(), called, after=lambda name, value: sizes.update({name: shape_of(value)}))
    told = {name: shape[1:] for name, shape in called.items() if name in sizes and sizes[name]}
    assert told and told == {name: sizes[name][1:] for name in told}
    again = describe_graph(smaller)
    plan = plan_of(again, 6)
    torch.testing.assert_close(
        cut_graph(smaller, again, plan)(x.clone()), mask_graph(smaller, again, plan)(x.clone()), rtol=1e-10, atol=1e-11
    )
