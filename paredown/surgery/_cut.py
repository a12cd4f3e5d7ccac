"""Cutting by index tables, and masking, which must compute the same: generic over every family.

Legend: U units, S entries of one unit along one axis of one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paredown.encoder import blocks_of, linear_of
from paredown.errors import FingerprintMismatch
from paredown.models import fingerprint
from paredown.surgery._modules import Headless, Idle, Skipped, keep_bias_heads
from paredown.types import Anatomy, Group, Layout, Plan, Slice

Model = TypeVar("Model", bound=nn.Module)


def cut(model: Model, anatomy: Anatomy, plan: Plan) -> Model:
    """A copy of the model that holds only what the plan keeps: smaller tensors, fewer layers, nothing masked.

    The model given is untouched, and what is cut away is never copied. Works on the meta device too. Raises
    `FingerprintMismatch` when plan, anatomy and model do not belong together.
    """
    layers = _check(model, anatomy, plan)
    changed = list(_changed(anatomy, plan, layers))
    memo = sliced(model, changed)
    blocks = blocks_of(model, anatomy.layout)
    memo.update({id(block): nn.Identity() for i, block in enumerate(blocks) if i not in layers})
    small = copy.deepcopy(model, memo)

    for name in {part.tensor for group, _ in changed for part in group.slices}:
        owner: Any = small.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif hasattr(owner, "nf"):  # GPT-2's Conv1D
            owner.nx, owner.nf = owner.weight.shape
    for group, keep in changed:
        if group.kind == "head":
            _settle_attention(small, anatomy.layout, group, keep)
        if group.kind == "neuron" and not keep:
            _settle_ffn(small, anatomy.layout, group)
        _count(small, group, len(keep))
    _keep_layers(small, anatomy, layers)
    return small


def mask(model: Model, anatomy: Anatomy, plan: Plan) -> Model:
    """A copy of full size that computes what `cut` computes: the consumers of dropped units are zero.

    This is the oracle for index tables. Dropped layers hand their input on; such a model runs through its stock forward
    pass only, since `Encoder` finds no parts in them.
    """
    layers = _check(model, anatomy, plan)
    masked = copy.deepcopy(model)
    zero_consumers(masked, list(_changed(anatomy, plan, layers)))
    blocks = blocks_of(masked, anatomy.layout)
    for i in range(len(blocks)):
        if i not in layers:
            blocks[i] = Skipped(blocks[i])
    return masked


def sliced(model: nn.Module, changed: Sequence[tuple[Group, Sequence[int]]]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` in which the tensors of these groups hold only what is kept.

    deepcopy takes what its memo already holds for an object: so the small tensors stand where the large ones stood,
    wherever they are referred to, and the large ones are never duplicated.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    gone: dict[tuple[str, int], list[Tensor]] = {}  # two groups may own the same entries, each in its own way
    for group, keep in changed:
        for part in group.slices:
            gone.setdefault((part.tensor, part.axis), []).append(_entries(part, _others(group, keep)))
    small: dict[str, Tensor] = {}
    for (name, axis), entries in gone.items():
        tensor = small.get(name, tensors[name].detach())
        stay = torch.ones(tensor.shape[axis], dtype=torch.bool)
        stay[torch.cat(entries)] = False
        small[name] = tensor.index_select(axis, stay.nonzero()[:, 0].to(tensor.device))
    return {
        id(tensors[name]): nn.Parameter(tensor, tensors[name].requires_grad)
        if isinstance(tensors[name], nn.Parameter)
        else tensor
        for name, tensor in small.items()
    }


def zero_consumers(model: nn.Module, changed: Sequence[tuple[Group, Sequence[int]]]) -> None:
    """Zeros, in place, where anything reads the dropped units of these groups."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for group, keep in changed:
        for part in group.slices:
            if part.role == "consumer":
                tensor = tensors[part.tensor].detach()
                tensor.index_fill_(part.axis, _entries(part, _others(group, keep)).to(tensor.device), 0)


def parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _others(group: Group, keep: Sequence[int]) -> list[int]:
    """The units of a group that go."""
    return sorted(set(range(group.units)) - set(keep))


def _entries(part: Slice, units: Sequence[int]) -> Tensor:
    """The positions of some units along the axis: U * S indices."""
    return torch.as_tensor(part.positions[list(units)].reshape(-1), dtype=torch.long)


def _layers_group(anatomy: Anatomy) -> Group:
    return next(group for group in anatomy.groups if group.kind == "layer")


def _changed(anatomy: Anatomy, plan: Plan, layers: Sequence[int]) -> Iterator[tuple[Group, tuple[int, ...]]]:
    """The groups of kept layers that lose units, with the units they keep."""
    for group in anatomy.groups:
        if group.kind != "layer" and group.layer in layers and len(plan.keep[group.name]) < group.units:
            yield group, plan.keep[group.name]


def _settle_attention(model: nn.Module, layout: Layout, group: Group, keep: tuple[int, ...]) -> None:
    layer = model.get_submodule(f"{layout.layers}.{group.layer}")
    name, output = layout.layer_names["attention"], layout.layer_names["output"]
    attention = layer.get_submodule(name)
    if not keep:
        inside = output.startswith(f"{name}.")
        layer.set_submodule(name, Headless(attention, output[len(name) + 1 :] if inside else ""))
    elif layout.position_bias:
        keep_bias_heads(attention, keep)


def _settle_ffn(model: nn.Module, layout: Layout, group: Group) -> None:
    """GPT-2's transposed projections cannot run on nothing; a Linear can."""
    layer = model.get_submodule(f"{layout.layers}.{group.layer}")
    name = layout.layer_names.get("ffn", "")
    if name and not isinstance(linear_of(layer, layout, "down"), nn.Linear):
        layer.set_submodule(name, Idle(layer.get_submodule(name), layout.layer_names["down"][len(name) + 1 :]))


def _count(model: nn.Module, group: Group, units: int) -> None:
    for counter in group.counters:
        setattr(model.get_submodule(counter.module), counter.attribute, counter.per_unit * units)


def _keep_layers(model: nn.Module, anatomy: Anatomy, layers: tuple[int, ...]) -> None:
    group = _layers_group(anatomy)
    if len(layers) == group.units:
        return
    blocks = blocks_of(model, anatomy.layout)
    for i in reversed(range(group.units)):
        if i not in layers:
            del blocks[i]
    for i, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment]
    _count(model, group, len(layers))
    config: Any = model.config
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(layers)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in layers]


def _check(model: nn.Module, anatomy: Anatomy, plan: Plan) -> tuple[int, ...]:
    """The layers kept, after making sure that plan, anatomy and model belong together."""
    if plan.fingerprint != anatomy.fingerprint:
        raise FingerprintMismatch(
            f"the plan is for the model {plan.fingerprint[:12]}, this anatomy is of {anatomy.fingerprint[:12]}"
        )
    found = fingerprint(model, ignore=anatomy.layout.unused)  # type: ignore[arg-type]
    if found != anatomy.fingerprint:
        raise FingerprintMismatch(
            f"the anatomy is of the model {anatomy.fingerprint[:12]}, the model given is {found[:12]}"
        )
    group = _layers_group(anatomy)
    layers = units_of(plan.keep, group)
    for other in anatomy.groups:
        if other.layer in layers:
            units_of(plan.keep, other)
    unknown = set(plan.keep) - {other.name for other in anatomy.groups}
    if unknown:
        raise FingerprintMismatch(
            f"the plan keeps units of {sorted(unknown)[0]!r}, a group that the model does not have"
        )
    return layers


def units_of(keep: Mapping[str, tuple[int, ...]], group: Group) -> tuple[int, ...]:
    if group.name not in keep:
        raise FingerprintMismatch(f"the plan does not say what is kept of {group.name!r}")
    units = tuple(keep[group.name])
    if any(b <= a for a, b in zip(units, units[1:], strict=False)):
        raise FingerprintMismatch(f"the plan's units of {group.name!r} are not sorted and distinct")
    if units and not 0 <= units[0] <= units[-1] < group.units:
        raise FingerprintMismatch(f"the plan keeps units up to {units[-1]} of {group.name!r}, which has {group.units}")
    if len(units) < group.minimum:
        raise FingerprintMismatch(f"the plan keeps {len(units)} units of {group.name!r}, which needs {group.minimum}")
    return units
